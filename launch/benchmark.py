"""Benchmarks of labelled steps: VisualProcessBench, ProcessBench, PRMBench, on their own files.

    python launch/benchmark.py --benchmark visualprocessbench --test_json_file test.jsonl \\
        --model runs/table/export --out runs/visualprocessbench
    torchrun --nproc_per_node 8 launch/benchmark.py --benchmark processbench \\
        --test_json_file gsm8k.json math.json --model runs/table/export runs/net/export --out out

Writes `results.json`, `scores.jsonl` (one line per PRM and solution), `rejected.jsonl` and
`config.yaml`. The files are the same bytes on any number of ranks, and for a benchmark that was
stopped and started again, as those of `launch/evaluate.py`.
"""

from dreamprm_dist.evaluation.benchmarks.run import BenchmarkConfig, run_benchmark
from dreamprm_dist.flags import parse_args, run


def main() -> None:
    (config,) = parse_args((BenchmarkConfig,), None, "Judge the labelled steps of a benchmark.")
    print(run_benchmark(config), end="")


if __name__ == "__main__":
    run(main)
