"""One page about training runs, benchmarks, or a demo: it loads nothing and can be sent to anyone.

    python launch/report.py runs/baseline runs/instance_table --results runs/eval/results.json
    python launch/report.py runs/visualprocessbench runs/processbench
    python launch/report.py runs/demo

Of runs it shows losses, learning rates, weights, the most raised and most lowered instances, what
the PRMs are worth and where time went; of benchmarks every metric with its interval, and
calibration. What a folder does not hold is left out, and the same folders give the same bytes.
"""

from pathlib import Path

from dreamprm_dist.errors import InputError
from dreamprm_dist.evaluation.benchmarks.results import is_benchmark
from dreamprm_dist.flags import CommandParser, run
from dreamprm_dist.report.benchmark import write_benchmark_report
from dreamprm_dist.report.demo import write_demo_report
from dreamprm_dist.report.overview import write_run_report


def main() -> None:
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "folders",
        type=Path,
        nargs="+",
        help="run folders, or benchmarks' folders, or one demo's folder",
    )
    parser.add_argument("--results", type=Path, help="results.json of an evaluation of the runs")
    parser.add_argument("--out", type=Path, help="page to write (default: in the first folder)")
    arguments = parser.parse_args()
    first = arguments.folders[0]
    if len(arguments.folders) == 1 and (first / "summary.json").exists():
        if arguments.out or arguments.results:
            raise InputError(f"{first} is a demo's folder; --out and --results are for runs")
        path = write_demo_report(first)
    elif any(of_benchmark := [is_benchmark(f / "results.json") for f in arguments.folders]):
        if not all(of_benchmark) or arguments.results:
            raise InputError("name folders of benchmarks alone, without --results")
        path = write_benchmark_report(arguments.folders, arguments.out or first / "report.html")
    else:
        out = arguments.out or first / "report.html"
        path = write_run_report(arguments.folders, out, arguments.results)
    print(f"report: {path}")


if __name__ == "__main__":
    run(main)
