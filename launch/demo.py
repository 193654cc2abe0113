"""The whole job on a small embedded default: data, cold start, weights, baselines, Best-of-N.

`make demo` runs it on two ranks, on the CPU. Every stage is the command that a user runs at scale.
With several seeds the stages are on one rank each, as many at a time as there are cores.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from data_tools.demo_data import NUM_META, NUM_TRAIN, make_demo_data, noise_auc
from data_tools.demo_methods import (
    COLD_START,
    FREE,
    KEPT,
    LEARNED,
    META_SIZES,
    METHODS,
    OTHER,
    OTHER_COLD_START,
    SIZED,
    Method,
    pairs_among,
)
from dreamprm_dist.evaluation.pooled import pooled
from dreamprm_dist.evaluation.results import Results, read_results

LAUNCH = Path(__file__).resolve().parent
RECIPES = LAUNCH / "recipes"


class Stages:
    """Runs stages, each after those that it needs, and so many at a time.

    Args:
        at_once: a stage has the share of the cores that this leaves it.
    """

    def __init__(self, at_once: int):
        self._pool = ThreadPoolExecutor(at_once)

    def add(self, work: Callable, *needs: Future) -> Future:
        """Add a stage, which may need what was added before it."""

        def run() -> object:
            for need in needs:
                need.result()
            return work()

        return self._pool.submit(run)

    def stop(self) -> None:
        """Start no more stages."""
        self._pool.shutdown(wait=False, cancel_futures=True)


@dataclass
class Demo:
    """One demo run in a folder of its own.

    Attributes:
        num_ranks: of a stage; its batches are those of two ranks.
        threads: of a rank.
        prms: names of the trained PRMs.
    """

    out: Path
    seed: int
    stages: Stages
    num_ranks: int
    threads: int
    prms: list[str] = field(default_factory=list)

    def start(self, everything: bool) -> Future:
        """Add all stages; the last one gives the evaluation's results.

        Args:
            everything: with all that `make demo-seeds` compares.
        """
        data = self.stages.add(self._data)
        base = self._add_base("base", self.seed, data)
        if everything:  # beside the first one, for nothing else can be done yet
            other_base = self._add_base("other_base", self.seed + 1000, data)
        cold_start = self._add_training("cold_start", COLD_START, base)
        runs = {name: self._add_training(name, m, cold_start) for name, m in METHODS.items()}
        if everything:
            self._add_comparisons(data, cold_start, other_base, runs)
        return self.stages.add(self._evaluate, cold_start, *runs.values())

    def _add_comparisons(
        self, data: Future, cold_start: Future, other_base: Future, runs: dict[str, Future]
    ) -> None:
        more_data = self.stages.add(self._more_data, data)
        for name, method in (LEARNED | SIZED).items():
            runs[name] = self._add_training(name, method, cold_start, more_data)
        for name in KEPT:
            kept = self.stages.add(lambda name=name: self._sample(name), cold_start)
            runs[f"{name}_plus_meta"] = self._add_training(
                f"{name}_plus_meta", FREE[f"{name}_plus_meta"], kept
            )
        start = self._add_training("other_cold_start", OTHER_COLD_START, other_base)
        for name, method in OTHER.items():
            runs[name] = self._add_training(name, method, start, runs["table_plus_meta"])

    def _add_base(self, name: str, seed: int, *needs: Future) -> Future:
        command = "-m", "data_tools.demo_model", "--data", self.out / "data", "--seed", seed
        return self.stages.add(
            lambda: self._python(name, *command, "--out", self.out / name / "export"), *needs
        )

    def _add_training(self, name: str, method: Method, *needs: Future) -> Future:
        """A training run, which is evaluated in the end."""
        self.prms.append(name)
        flags = list(method.flags)
        if "fixed" in flags:
            weights = self.out / "table_plus_meta" / "export" / "instance_weights.parquet"
            flags += ["--instance_weights", weights]
        if self.num_ranks == 1:
            flags += ["--gradient_accumulation", 2, "--meta_gradient_accumulation", 2]
        shards = self.out / "shards"
        return self.stages.add(
            lambda: self._on_ranks(
                *(name, "train.py"),
                *("--config", RECIPES / f"demo_{method.recipe}.yaml", "--seed", self.seed),
                *("--train_json_file", shards / method.train / "train"),
                *("--meta_json_file", shards / method.meta / "meta"),
                *("--reward_model", self.out / method.start / "export"),
                *("--out", self.out / name, *flags),
            ),
            *needs,
        )

    def _data(self) -> None:
        make_demo_data(self.out / "data", self.seed)
        self._shard("train", "train", "train.json")
        self._shard("meta", "meta", "meta.json")
        self._shard("train", "meta_only", "meta.json")

    def _more_data(self) -> None:
        """Smaller meta sets, and the control whose answers say nothing."""
        meta = json.loads((self.out / "data" / "meta.json").read_text())
        for size in META_SIZES:
            (self.out / "data" / f"meta-{size}.json").write_text(json.dumps(meta[:size]))
            self._shard("meta", f"meta-{size}", f"meta-{size}.json")
            self._shard("train", f"meta_only-{size}", f"meta-{size}.json")
        self._shard("meta", "shuffled_meta", "shuffled_meta.json")

    def _sample(self, name: str) -> None:
        """The training data that a free baseline keeps."""
        data, losses = self.out / "data", self.out / "cold_start/export/instance_losses.parquet"
        by: list[object] = ["--balance", "none"] if name == "random" else ["--rank_by", name]
        by += ["--instance_losses", losses] if name == "small_loss" else []
        self._python(
            *(f"sample {name}", "-m", "data_tools.sample", data / "train.json"),
            *("--n", KEPT[name], "--seed", self.seed, "--out", data / f"{name}.jsonl", *by),
        )
        self._shard("train", name, f"{name}.jsonl")

    def _shard(self, kind: str, name: str, file: str) -> None:
        """Shard a file as training or meta records, into `shards/NAME/KIND`."""
        source, out = self.out / "data" / file, self.out / "shards" / name
        self._python(f"shard {name}", "-m", "data_tools.shard", f"--{kind}", source, "--out", out)

    def _evaluate(self) -> Results:
        """Best-of-N of all PRMs on the test questions."""
        folder = self.out / "evaluation"
        self._on_ranks(
            *("evaluate", "evaluate.py"),
            *("--model", *(self.out / name / "export" for name in self.prms)),
            *("--test_json_file", self.out / "data" / "test.json"),
            *("--out", folder, "--precision", "fp32"),
        )
        return read_results(folder / "results.json")

    def noise_aucs(self) -> dict[str, float]:
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
        """Run a stage that is a script of `launch/` on the demo's ranks."""
        launcher: list[object] = []
        if self.num_ranks > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone"]
            launcher += ["--nproc_per_node", self.num_ranks]
        # The model is a CPU's size, and a machine with one GPU would have none for the second rank.
        self._python(stage, *launcher, LAUNCH / script, *arguments, "--device", "cpu")

    def _python(self, stage: str, *arguments: object) -> None:
        """Run a stage as a command of its own, its output in `logs/`; stop when it fails."""
        log = self.out / "logs" / f"{stage.replace(' ', '_')}.log"
        log.parent.mkdir(exist_ok=True)
        command = [sys.executable, *map(str, arguments)]
        start = time.monotonic()
        # More threads than cores would wait for each other.
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
        with log.open("w") as output:
            output.write(" ".join(command) + "\n\n")
            output.flush()
            code = subprocess.run(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False
            ).returncode
        print(f"{self.out.name}: {stage}, {time.monotonic() - start:.0f} s", flush=True)
        if code:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise StageError(
                f"{tail}\nerror: stage {stage} failed with exit code {code}; see {log}"
            )


class StageError(Exception):
    """A stage's end with the last lines that it said."""


def run_seeds(out: Path, seeds: list[int], everything: bool) -> dict:
    """The demo for each seed, and what the seeds show together.

    Args:
        everything: with all that `make demo-seeds` compares, on one rank a stage, side by side.
    """
    start, cores = time.monotonic(), os.cpu_count() or 1
    stages = Stages(cores if everything else 1)
    num_ranks = 1 if everything else 2
    threads = 1 if everything else max(1, cores // num_ranks)
    folders = {seed: out / f"seed-{seed}" if everything else out for seed in seeds}
    demos = [Demo(folders[seed], seed, stages, num_ranks, threads) for seed in seeds]
    for demo in demos:
        demo.out.mkdir(parents=True, exist_ok=True)
    try:
        started = [demo.start(everything) for demo in demos]
        results = [future.result() for future in started]
    except BaseException:
        stages.stop()
        raise
    summaries = [
        {"seed": demo.seed, "noise_auc": demo.noise_aucs()}
        | pooled([found], pairs_among(demo.prms))
        for demo, found in zip(demos, results, strict=True)
    ]
    summary = summaries[0]
    if everything:
        aucs = {
            name: [summary["noise_auc"][name] for summary in summaries]
            for name in summaries[0]["noise_auc"]
        }
        summary = {
            "seeds": summaries,
            "meta_sizes": [*META_SIZES, NUM_META],
            "kept": {name: number / NUM_TRAIN for name, number in KEPT.items()},
            "noise_auc": {name: float(np.mean(values)) for name, values in aucs.items()},
            "noise_auc_lowest": {name: min(values) for name, values in aucs.items()},
        } | pooled(results, pairs_among(demos[0].prms))
    summary["seconds"] = round(time.monotonic() - start, 1)
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
    try:
        summary = run_seeds(
            arguments.out, arguments.seeds or [arguments.seed], bool(arguments.seeds)
        )
    except StageError as error:
        sys.exit(str(error))
    shown = {key: value for key, value in summary.items() if key != "seeds"}
    print(json.dumps(shown, indent=2))
    print(f"report: {arguments.out / 'report.html'}")


if __name__ == "__main__":
    main()
