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
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from data_tools.demo_data import NUM_META, NUM_TRAIN, make_demo_data, noise_auc
from dreamprm_dist.evaluation.pooled import pooled
from dreamprm_dist.evaluation.results import Results, read_results

LAUNCH = Path(__file__).resolve().parent
RECIPES = LAUNCH / "recipes"
NUM_RANKS = 2
PLUS_META = ("--train_on_meta", "steps")
# Of `make demo-seeds`: sizes of smaller meta sets, in solutions, and how many training solutions
# each free baseline keeps.
META_SIZES = (48, 96, 192)
KEPT = {"bis": 600, "mc_agreement": 600, "small_loss": 600, "random": 600}


@dataclass(frozen=True)
class Method:
    """How a PRM of the demo is trained, from a cold start on.

    Attributes:
        recipe: file in recipes/, less `demo_`.
        flags: beside it.
        train, meta: shard folders.
        start: the run whose export it starts from.
    """

    recipe: str
    flags: tuple[object, ...] = ()
    train: str = "train"
    meta: str = "meta"
    start: str = "cold_start"


METHODS = {
    "baseline": Method("baseline"),
    "baseline_plus_meta": Method("baseline", PLUS_META),
    "instance_table": Method("instance_table"),
    "table_plus_meta": Method("instance_table", PLUS_META),
}
# Those of `make demo-seeds`.
SIZED = {
    f"{name}-{size}": Method(
        method.recipe,
        # A global meta batch is no larger than the meta set.
        (*method.flags, *("--meta_batch_size", min(96, size // NUM_RANKS))),
        meta=f"meta-{size}",
    )
    for size in META_SIZES
    for name, method in METHODS.items()
    if name != "baseline"
}
FREE = {f"{name}_plus_meta": Method("baseline", PLUS_META, train=name) for name in KEPT}
LEARNED = {
    "instance_net": Method("instance_net"),
    "net_plus_meta": Method("instance_net", PLUS_META),
    "domain_table": Method("domain_table"),
    "shuffled_meta": Method("instance_table", meta="shuffled_meta"),
}
# Another model with the weights that the first one has learned.
OTHER = {
    "other_baseline": Method("baseline", PLUS_META, start="other_cold_start"),
    "other_fixed": Method(
        "instance_table", (*PLUS_META, "--reweighter", "fixed"), start="other_cold_start"
    ),
}
PAIRS = [
    ("table_plus_meta", "baseline_plus_meta"),
    ("instance_table", "baseline"),
    ("instance_table", "baseline_plus_meta"),
    *(("table_plus_meta", name) for name in FREE),
    *((name, "baseline_plus_meta") for name in FREE),
    ("net_plus_meta", "baseline_plus_meta"),
    ("instance_net", "baseline"),
    ("other_fixed", "other_baseline"),
    *((f"table_plus_meta-{n}", f"baseline_plus_meta-{n}") for n in META_SIZES),
    *((f"instance_table-{n}", "baseline") for n in META_SIZES),
]


@dataclass
class Demo:
    """One demo run in a folder of its own.

    Attributes:
        everything: with all that `make demo-seeds` compares.
    """

    out: Path
    seed: int
    everything: bool
    prms: list[str] = field(default_factory=list)

    def run(self) -> tuple[dict, Results]:
        """All stages; returns `summary.json`'s content and the evaluation's results."""
        start = time.monotonic()
        self._data()
        self._base("base", self.seed)
        self._train("cold_start", Method("cold_start", ("--export_losses",), start="base"))
        for name, method in METHODS.items():
            self._train(name, method)
        if self.everything:
            self._all_comparisons()
        results = self._evaluate()
        summary = {
            "seed": self.seed,
            "seconds": round(time.monotonic() - start, 1),
            "noise_auc": self._noise_aucs(),
        } | pooled([results], pairs_among(self.prms))
        (self.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        self._python("report", LAUNCH / "report.py", self.out)
        return summary, results

    def _data(self) -> None:
        make_demo_data(self.out / "data", self.seed)
        self._shard("train", "train.json")
        self._shard("meta", "meta.json")

    def _all_comparisons(self) -> None:
        for name, method in LEARNED.items():
            if method.meta != "meta":
                self._shard(method.meta, f"{method.meta}.json")
            self._train(name, method)
        losses = self.out / "cold_start" / "export" / "instance_losses.parquet"
        for name, number in KEPT.items():
            by: list[object] = ["--balance", "none"] if name == "random" else ["--rank_by", name]
            by += ["--instance_losses", losses] if name == "small_loss" else []
            data = self.out / "data"
            self._python(
                *(f"sample {name}", "-m", "data_tools.sample", data / "train.json"),
                *("--n", number, "--seed", self.seed, "--out", data / f"{name}.jsonl", *by),
            )
            self._shard(name, f"{name}.jsonl")
            self._train(f"{name}_plus_meta", FREE[f"{name}_plus_meta"])
        meta = json.loads((self.out / "data" / "meta.json").read_text())
        for size in META_SIZES:
            path = self.out / "data" / f"meta-{size}.json"
            path.write_text(json.dumps(meta[:size]))
            self._shard(f"meta-{size}", path.name)
        for name, method in SIZED.items():
            self._train(name, method)
        self._base("other_base", self.seed + 1000)
        self._train("other_cold_start", Method("cold_start", start="other_base"))
        weights = self.out / "table_plus_meta" / "export" / "instance_weights.parquet"
        self._train("other_baseline", OTHER["other_baseline"])
        self._train("other_fixed", OTHER["other_fixed"], "--instance_weights", weights)

    def _base(self, name: str, seed: int) -> None:
        self._python(
            *(name, "-m", "data_tools.demo_model", "--data", self.out / "data"),
            *("--out", self.out / name / "export", "--seed", seed),
        )

    def _shard(self, name: str, file: str) -> None:
        kind = "--meta" if "meta" in name else "--train"
        source, out = self.out / "data" / file, self.out / "shards" / name
        self._python(f"shard {name}", "-m", "data_tools.shard", kind, source, "--out", out)

    def _train(self, name: str, method: Method, *flags: object) -> None:
        """A training run on two ranks, which is evaluated in the end."""
        shards = self.out / "shards"
        self._on_ranks(
            *(name, "train.py"),
            *("--config", RECIPES / f"demo_{method.recipe}.yaml", "--seed", self.seed),
            *("--train_json_file", shards / method.train / "train"),
            *("--meta_json_file", shards / method.meta / "meta"),
            *("--reward_model", self.out / method.start / "export"),
            *("--out", self.out / name, *method.flags, *flags),
        )
        self.prms.append(name)

    def _evaluate(self) -> Results:
        """Best-of-N of all PRMs on the test questions, on two ranks."""
        folder = self.out / "evaluation"
        self._on_ranks(
            *("evaluate", "evaluate.py"),
            *("--model", *(self.out / name / "export" for name in self.prms)),
            *("--test_json_file", self.out / "data" / "test.json"),
            *("--out", folder, "--precision", "fp32"),
        )
        return read_results(folder / "results.json")

    def _noise_aucs(self) -> dict[str, float]:
        """Of the weights of each run that has learned some, and of the cold start's losses."""
        scores = {
            name: self._column(name, "weights", "weight")
            for name in self.prms
            if (self.out / name / "export" / "instance_weights.parquet").exists()
        }
        scores["small_loss"] = -self._column("cold_start", "losses", "loss")
        return {name: noise_auc(self.out / "data", values) for name, values in scores.items()}

    def _column(self, name: str, file: str, column: str) -> np.ndarray:
        table = pd.read_parquet(self.out / name / "export" / f"instance_{file}.parquet")
        return table.sort_values("sample_id")[column].to_numpy()

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


def pairs_among(prms: list[str]) -> list[tuple[str, str]]:
    """The pairs of which both were trained."""
    return [pair for pair in PAIRS if {*pair} <= {*prms}]


def run_seeds(out: Path, seeds: list[int]) -> dict:
    """The demo and all its comparisons for each seed, then what they show together."""
    demos = [Demo(out / f"seed-{seed}", seed, everything=True) for seed in seeds]
    outcomes = [demo.run() for demo in demos]
    summaries = [summary for summary, _ in outcomes]
    aucs = {
        name: [summary["noise_auc"][name] for summary in summaries]
        for name in summaries[0]["noise_auc"]
    }
    summary = {
        "seeds": summaries,
        "seconds": sum(summary["seconds"] for summary in summaries),
        "meta_sizes": [*META_SIZES, NUM_META],
        "kept": {name: number / NUM_TRAIN for name, number in KEPT.items()},
        "noise_auc": {name: float(np.mean(values)) for name, values in aucs.items()},
        "noise_auc_lowest": {name: min(values) for name, values in aucs.items()},
    } | pooled([results for _, results in outcomes], pairs_among(demos[0].prms))
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    subprocess.run([sys.executable, LAUNCH / "report.py", out], check=True)
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="run folder")
    parser.add_argument("--seed", type=int, default=1, help="seed of data, model and order")
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        help="several seeds, each with all comparisons: other reweighters, free baselines, smaller "
        "meta sets, another model, shuffled meta answers",
    )
    arguments = parser.parse_args()
    shutil.rmtree(arguments.out, ignore_errors=True)
    arguments.out.mkdir(parents=True)
    if arguments.seeds:
        summary = run_seeds(arguments.out, arguments.seeds)
        summary = {key: value for key, value in summary.items() if key != "seeds"}
    else:
        summary, _ = Demo(arguments.out, arguments.seed, everything=False).run()
    print(json.dumps(summary, indent=2))
    print(f"report: {arguments.out / 'report.html'}")


if __name__ == "__main__":
    main()
