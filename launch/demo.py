"""The whole job on a small embedded default: data, cold start, weights, baselines, Best-of-N.

`make demo` runs it on two ranks, on the CPU. Every stage is the command that a user runs at scale.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from data_tools.demo_data import make_demo_data, noise_auc
from dreamprm_dist.data.shards import ShardFolder
from dreamprm_dist.evaluation.best_of_n import clustered_bootstrap
from dreamprm_dist.evaluation.compare import BASICS
from dreamprm_dist.evaluation.results import Results, read_results
from dreamprm_dist.losses import instance_losses
from dreamprm_dist.prm.batch import InputFormat, collate, encode_instance
from dreamprm_dist.prm.model import load_prm, load_tokenizer

LAUNCH = Path(__file__).resolve().parent
RECIPES = LAUNCH / "recipes"
NUM_RANKS = 2
WEIGHTED = ("instance_table", "instance_net", "domain_table")
PRMS = ("cold_start", "baseline", "baseline_plus_meta", *WEIGHTED)
DIFFERENCES = [("instance_table", other) for other in PRMS[:3]] + [("instance_net", "baseline")]


@dataclass
class Demo:
    """One demo run in a folder of its own."""

    out: Path
    seed: int
    shuffled_meta: bool

    def run(self) -> tuple[dict, Results]:
        """All stages; returns `summary.json`'s content and the evaluation's results."""
        start = time.monotonic()
        self._data()
        cold_start = self._train("cold_start", "demo_cold_start", "train", self.out / "base")
        self._train("baseline", "demo_baseline", "train", cold_start)
        self._train("baseline_plus_meta", "demo_baseline", "train_plus_meta", cold_start)
        scores = {}
        for name in WEIGHTED:
            self._train(name, f"demo_{name}", "train", cold_start)
            scores[name] = self._weights(name)
        scores["small_loss"] = -self._instance_losses(cold_start)
        if self.shuffled_meta:
            self._train("shuffled_meta", "demo_instance_table", "train", cold_start)
            scores["shuffled_meta"] = self._weights("shuffled_meta")
        results = self._evaluate()
        summary = {
            "seed": self.seed,
            "seconds": round(time.monotonic() - start, 1),
            "noise_auc": {name: noise_auc(self.out / "data", s) for name, s in scores.items()},
        } | pooled([results])
        (self.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        self._python("report", LAUNCH / "report.py", self.out)
        return summary, results

    def _data(self) -> None:
        data = self.out / "data"
        make_demo_data(data, self.seed)
        records = {n: json.loads((data / f"{n}.json").read_text()) for n in ("train", "meta")}
        both = records["train"] + records["meta"]
        (data / "train_plus_meta.json").write_text(json.dumps(both))
        seed = ["--seed", str(self.seed)]
        self._python(
            "base", "-m", "data_tools.demo_model", "--data", data, "--out", self.out / "base", *seed
        )
        control = ("shuffled_meta",) if self.shuffled_meta else ()
        for name in ("train", "train_plus_meta", "meta", *control):
            kind = "--train" if name.startswith("train") else "--meta"
            source, shards = data / f"{name}.json", self.out / "shards" / name
            self._python(f"shard {name}", "-m", "data_tools.shard", kind, source, "--out", shards)

    def _train(self, name: str, recipe: str, train: str, start_from: Path) -> Path:
        """A training run on two ranks; returns its export."""
        meta = name if name == "shuffled_meta" else "meta"
        run = self.out / name
        self._on_ranks(
            *(name, "train.py"),
            *("--config", RECIPES / f"{recipe}.yaml", "--seed", self.seed),
            *("--train_json_file", self.out / "shards" / train / "train"),
            *("--meta_json_file", self.out / "shards" / meta / "meta"),
            *("--reward_model", start_from, "--out", run),
        )
        return run / "export"

    def _evaluate(self) -> Results:
        """Best-of-N of all PRMs on the test questions, on two ranks."""
        folder = self.out / "evaluation"
        self._on_ranks(
            *("evaluate", "evaluate.py"),
            *("--model", *(self.out / name / "export" for name in PRMS)),
            *("--test_json_file", self.out / "data" / "test.json"),
            *("--out", folder, "--precision", "fp32"),
        )
        return read_results(folder / "results.json")

    def _on_ranks(self, stage: str, script: str, *arguments: object) -> None:
        """Run a stage that is a script of `launch/` on two ranks."""
        # The model is a CPU's size, and a machine with one GPU would have none for the second rank.
        self._python(
            *(stage, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", NUM_RANKS),
            *(LAUNCH / script, *arguments, "--device", "cpu"),
        )

    def _python(self, stage: str, *arguments: object) -> None:
        """Run a stage as a command of its own, its output in `logs/`; stop when it fails."""
        log = self.out / "logs" / f"{stage.replace(' ', '_')}.log"
        log.parent.mkdir(exist_ok=True)
        command = [sys.executable, *map(str, arguments)]
        print(f"{stage} ...", end=" ", flush=True)
        start = time.monotonic()
        # The ranks of a stage share the cores; more threads than cores would wait for each other.
        environment = os.environ | {
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // NUM_RANKS))
        }
        with log.open("w") as output:
            output.write(" ".join(command) + "\n\n")
            output.flush()
            code = subprocess.run(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False
            ).returncode
        print(f"{time.monotonic() - start:.0f} s", flush=True)
        if code:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            sys.exit(f"{tail}\nerror: stage {stage} failed with exit code {code}; see {log}")

    def _weights(self, name: str) -> np.ndarray:
        weights = pd.read_parquet(self.out / name / "export" / "instance_weights.parquet")
        return weights["weight"].to_numpy()

    @torch.no_grad()
    def _instance_losses(self, model: Path) -> np.ndarray:
        """Losses of a model on the noisy training labels, in the order of sample IDs."""
        prm, tokenizer = load_prm(str(model), "fp32").eval(), load_tokenizer(str(model))
        shards = ShardFolder(self.out / "shards" / "train" / "train")
        format = InputFormat(6, prm.tile_size, prm.tokens_per_tile)
        losses = np.empty(shards.num_rows)
        for shard, rows in enumerate(shards.rows_per_shard):
            for first in range(0, rows, 32):
                records = [shards.read(shard, row) for row in range(first, min(first + 32, rows))]
                instances = [
                    encode_instance(r["conversations"], r["images"], tokenizer, format)
                    for r in records
                ]
                batch = collate(instances, tokenizer.pad_token_id)
                values = instance_losses(prm(batch).logits, batch)
                losses[[r["sample_id"] for r in records]] = values
        return losses


def pooled(runs: list[Results]) -> dict:
    """Accuracies over the questions of all runs, and paired differences with 95 % intervals.

    The bootstrap resamples digit images, for questions about one image are not independent.

    Args:
        runs: the evaluation of each seed.
    """
    sizes = [run.num_questions for run in runs]
    accuracy = {
        name: float(np.average([run.accuracies()[name] for run in runs], weights=sizes))
        for name in BASICS
    }
    correct = {
        name: np.concatenate([run.prms[name].correct["mean"] for run in runs]).astype(float)
        for name in PRMS
    }
    # Seeds split the same digits anew, so one digit is one cluster in all of them.
    clusters = [tuple(question.images) for run in runs for question in run.questions]
    differences = {}
    for name, other in DIFFERENCES:
        mean, low, high = clustered_bootstrap(correct[name] - correct[other], clusters)
        differences[f"{name}_minus_{other}"] = {"mean": mean, "low": low, "high": high}
    return {
        "num_questions": sum(sizes),
        "accuracy": accuracy | {name: float(values.mean()) for name, values in correct.items()},
        "differences": differences,
    }


def run_seeds(out: Path, seeds: list[int]) -> dict:
    """The demo and its controls for each seed, then what they show together."""
    outcomes = [Demo(out / f"seed-{seed}", seed, shuffled_meta=True).run() for seed in seeds]
    summaries = [summary for summary, _ in outcomes]
    aucs = {
        name: [summary["noise_auc"][name] for summary in summaries]
        for name in summaries[0]["noise_auc"]
    }
    summary = {
        "seeds": summaries,
        "seconds": sum(summary["seconds"] for summary in summaries),
        "noise_auc": {name: float(np.mean(values)) for name, values in aucs.items()},
        "noise_auc_lowest": {name: min(values) for name, values in aucs.items()},
    } | pooled([results for _, results in outcomes])
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    subprocess.run([sys.executable, LAUNCH / "report.py", out], check=True)
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="run folder")
    parser.add_argument("--seed", type=int, default=1, help="seed of data, model and order")
    parser.add_argument(
        "--seeds", type=int, nargs="+", help="several seeds, each with the shuffled-meta control"
    )
    arguments = parser.parse_args()
    shutil.rmtree(arguments.out, ignore_errors=True)
    arguments.out.mkdir(parents=True)
    if arguments.seeds:
        summary = run_seeds(arguments.out, arguments.seeds)
        summary = {key: value for key, value in summary.items() if key != "seeds"}
    else:
        summary, _ = Demo(arguments.out, arguments.seed, shuffled_meta=False).run()
    print(json.dumps(summary, indent=2))
    print(f"report: {arguments.out / 'report.html'}")


if __name__ == "__main__":
    main()
