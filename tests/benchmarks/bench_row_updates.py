"""What a long run does to the instance table's row updates, on the demo.

    make demo-seeds
    python tests/benchmarks/bench_row_updates.py [--row_updates normalized_sgd adamw]

Trains the demo's table, from the cold starts that `make demo-seeds` left, for the demo's iterations
and for three times as many, with each row update; then compares Best-of-N accuracy, pooled over
seeds. Not a part of `make bench`: two updates and three seeds take more than an hour on two
cores. A run that has ended is not repeated: remove its folder when the demo or its recipe has
changed.
"""

import argparse
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from standin import run_on_ranks, write_results

from data_tools.demo_data import noise_auc
from dreamprm_dist.evaluation.best_of_n import clustered_bootstrap
from dreamprm_dist.evaluation.results import read_results

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
RECIPE = LAUNCH / "recipes" / "demo_instance_table.yaml"
ITERATIONS = yaml.safe_load(RECIPE.read_text())["iteration_num"]
NUM_RANKS = 2  # as the demo
LONGER = 3
# A step of AdamW has the length of its learning rate; the recipe's is for the other update.
FLAGS = {
    "normalized_sgd": (),
    "adamw": ("--row_update=adamw", "--meta_lr=0.05"),
}


def run(log: Path, script: str, *arguments: object) -> None:
    """A script of `launch/` on two ranks, its output in a file."""
    print(log.stem, flush=True)
    with log.open("w") as output:
        streams = {"stdout": output, "stderr": subprocess.STDOUT}
        run_on_ranks(NUM_RANKS, LAUNCH / script, *arguments, **streams)


def train(demo: Path, out: Path, row_update: str, iterations: int) -> Path:
    """A run of the demo's table; returns its export."""
    folder = out / f"{row_update}-{iterations}"
    if not (folder / "export" / "instance_weights.parquet").exists():
        run(
            *(out / f"{folder.name}.log", "train.py", "--config", RECIPE),
            *("--seed", demo.name.removeprefix("seed-"), "--iteration_num", iterations),
            *("--train_json_file", demo / "shards" / "train" / "train"),
            *("--meta_json_file", demo / "shards" / "meta" / "meta"),
            *("--reward_model", demo / "cold_start" / "export", "--weights_path", folder),
            *FLAGS[row_update],
        )
    return folder / "export"


def of_seed(demo: Path, out: Path, row_updates: list[str]) -> dict:
    """Noise AUC and right picks of all runs of a seed."""
    out.mkdir(parents=True, exist_ok=True)
    exports = [
        train(demo, out, row_update, iterations)
        for row_update in row_updates
        for iterations in (ITERATIONS, LONGER * ITERATIONS)
    ]
    run(
        *(out / "evaluation.log", "evaluate.py", "--model", *exports),
        *("--test_json_file", demo / "data" / "test.json"),
        *("--output_dir", out / "evaluation", "--precision", "fp32"),
    )
    results = read_results(out / "evaluation" / "results.json")
    weights = {e.parent.name: pd.read_parquet(e / "instance_weights.parquet") for e in exports}
    return {
        "noise_auc": {n: noise_auc(demo / "data", w["weight"]) for n, w in weights.items()},
        "correct": {name: prm.correct["mean"] for name, prm in results.prms.items()},
        "images": [question.images for question in results.questions],
    }


def summary(seeds: list[dict], row_update: str) -> dict:
    """Of one row update, over all seeds: accuracies, noise AUCs, their difference in accuracy."""
    end, longer = f"{row_update}-{ITERATIONS}", f"{row_update}-{LONGER * ITERATIONS}"
    correct = {
        name: np.concatenate([seed["correct"][name] for seed in seeds]).astype(float)
        for name in (end, longer)
    }
    clusters = [tuple(images) for seed in seeds for images in seed["images"]]
    mean, low, high = clustered_bootstrap(correct[longer] - correct[end], clusters)
    return {
        "num_questions": len(clusters),
        "accuracy": {name: values.mean() for name, values in correct.items()},
        "noise_auc": {name: [s["noise_auc"][name] for s in seeds] for name in (end, longer)},
        "longer_minus_end": {"mean": mean, "low": low, "high": high},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, default=Path("runs/demo-seeds"))
    parser.add_argument("--runs", type=Path, default=Path("runs/row-updates"))
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    parser.add_argument("--row_updates", nargs="+", choices=FLAGS, default=list(FLAGS))
    arguments = parser.parse_args()
    seeds = [
        of_seed(demo, arguments.runs / demo.name, arguments.row_updates)
        for demo in sorted(arguments.demo.glob("seed-*"))
    ]
    updates = {update: summary(seeds, update) for update in arguments.row_updates}
    write_results(arguments.out, {"row_updates": updates})


if __name__ == "__main__":
    main()
