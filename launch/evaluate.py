"""Best-of-N evaluation: trained PRMs choose among candidate solutions, one table for all.

    python launch/evaluate.py --model runs/table/export --test_json_file test.json --out out
    torchrun --nproc_per_node 8 launch/evaluate.py --model runs/table/export runs/net/export ...

Writes `results.json`, `scores.jsonl` (one line per PRM and candidate), `rejected.jsonl` and
`config.yaml`. The files are the same bytes on any number of ranks, and for an evaluation that
was stopped and started again, as long as each rank has the same number of threads
(OMP_NUM_THREADS; torchrun sets it to 1): on a CPU that number changes rounding.
"""

from dreamprm_dist.evaluation.run import EvaluateConfig, evaluate
from dreamprm_dist.flags import parse_args, run


def main() -> None:
    (config,) = parse_args((EvaluateConfig,), None, "Choose the best of N candidate solutions.")
    print(evaluate(config), end="")


if __name__ == "__main__":
    run(main)
