"""What a bi-level iteration costs over a plain step, phase by phase, within one run.

    python tests/benchmarks/bench_iteration.py [--out bench.json]

One rank, float32, a model with InternVL3-1B's shape made small, batches of its own data; medians
over interleaved repeats.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from data_tools.demo_data import make_demo_data
from data_tools.demo_model import data_texts, make_tiny_model
from data_tools.shard import shard_file
from dreamprm_dist import distributed
from dreamprm_dist.config import parse_train_config
from dreamprm_dist.data.shards import ShardFolder
from dreamprm_dist.trainer import BilevelTrainer

REPEATS = 9


def make_trainer(folder: Path) -> BilevelTrainer:
    make_demo_data(folder, seed=0, num_train=64, num_meta=32, num_test=4)
    make_tiny_model(folder / "base", data_texts(folder))
    for name, kind in (("train", "training"), ("meta", "meta")):
        shard_file(folder / f"{name}.json", folder / "shards" / name, kind, 4, progress=False)
    config = parse_train_config(
        [
            *("--reward_model", str(folder / "base"), "--weights_path", str(folder / "run")),
            *("--precision", "fp32", "--num_workers", "0", "--device", "cpu"),
            *("--batch_size", "16", "--meta_batch_size", "16"),
        ]
    )
    train, meta = (ShardFolder(folder / "shards" / name) for name in ("train", "meta"))
    return BilevelTrainer(config, train, meta, distributed.initialize("cpu"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(Path(folder))
        lower = trainer._stream(trainer.train_batches, 2 * REPEATS + 2)
        meta = trainer._stream(trainer.meta_batches, REPEATS + 1)
        plain, bilevel, phases = [], [], []
        for repeat in range(REPEATS + 1):
            batches = next(lower)
            start = time.perf_counter()
            trainer.engine.lower_step(batches, lambda output, losses, batch: torch.ones(len(batch)))
            middle = time.perf_counter()
            trainer.iteration(lower, meta)
            end = time.perf_counter()
            if repeat:  # the first one warms up
                plain.append(middle - start)
                bilevel.append(end - middle)
                phases.append(trainer.phases.take())
            else:
                trainer.phases.take()
    result = {
        "iteration_ratio": {"k1_all": statistics.median(bilevel) / statistics.median(plain)},
        "seconds": {
            "plain_step": statistics.median(plain),
            "bilevel_iteration": statistics.median(bilevel),
            **{name: statistics.median(p[name] for p in phases) for name in phases[0]},
        },
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    distributed.shutdown()


if __name__ == "__main__":
    main()
