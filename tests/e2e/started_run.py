"""A run on several ranks, each a process of its own, that tests start, hurt and start again."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

TRAIN = Path(__file__).resolve().parents[2] / "launch" / "train.py"
ITERATIONS = 14
# The folder of a run is its working directory, so that the exported model cards are equal too.
# Schedules of both kinds: one that is a function of the step and one that multiplies as it goes.
FLAGS = [
    *("--precision", "fp32", "--num_workers", "1", "--device", "cpu", "--weights_path", "run"),
    *("--batch_size", "4", "--meta_batch_size", "2", "--iteration_num", str(ITERATIONS)),
    *("--lr", "1e-3", "--scheduler_type", "step_lr", "--scheduler_step_size", "3"),
    *("--meta_lr", "0.1", "--save_every_iterations", "3", "--unroll_steps", "2"),
]


class Run:
    """A run in a folder; each start goes on with what the folder holds."""

    def __init__(self, folder: Path, model: Path, shards: Path):
        self.folder, self.run_folder = folder, folder / "run"
        self.data = [
            *("--train_json_file", shards / "train", "--meta_json_file", shards / "meta"),
            *("--reward_model", model),
        ]

    @contextlib.contextmanager
    def started(self, *flags: str, num_ranks: int = 2) -> Iterator[list[subprocess.Popen]]:
        """The ranks, each in a process group of its own; gone at the end of the block."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        ranks = []
        for rank in range(num_ranks):
            environment = os.environ | {
                **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)},
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            }
            with (self.folder / f"log-{rank}").open("w") as log:
                command = [sys.executable, TRAIN, *FLAGS, *self.data, *flags]
                ranks.append(
                    subprocess.Popen(
                        [str(part) for part in command],
                        **{"stdout": log, "stderr": subprocess.STDOUT, "env": environment},
                        cwd=self.folder,
                        start_new_session=True,
                    )
                )
        try:
            yield ranks
        finally:
            for process in ranks:
                process.kill()
                process.wait()

    def finish(self, *flags: str, num_ranks: int = 2) -> None:
        with self.started(*flags, num_ranks=num_ranks) as ranks:
            codes = [process.wait(timeout=240) for process in ranks]
            assert codes == [0] * num_ranks, self.log()

    def log(self, rank: int = 0) -> str:
        return (self.folder / f"log-{rank}").read_text(errors="replace")

    def wait_for(self, condition: Callable[[], bool], ranks: list[subprocess.Popen]) -> None:
        end = time.monotonic() + 240
        while not condition():
            assert all(process.poll() is None for process in ranks), self.log()
            assert time.monotonic() < end, self.log()
            time.sleep(0.005)

    def metrics(self) -> list[dict]:
        """The lines that were written to their end, without what a clock or the system says."""
        file = self.run_folder / "metrics.jsonl"
        lines = file.read_text().split("\n")[:-1] if file.exists() else []
        clocks = ("seconds", "samples_per_second", "peak_memory", "checkpoint_bytes")
        return [
            {k: v for k, v in json.loads(line).items() if not k.startswith(clocks)}
            for line in lines
        ]

    def checkpoints(self) -> list[int]:
        folders = (self.run_folder / "checkpoints").glob("iteration-*")
        return sorted(int(f.name.split("-")[1]) for f in folders if f.suffix == "")


def same_files(one: Path, other: Path) -> list[str]:
    """Names of the files of two folders, whose bytes are equal."""
    names = sorted(str(f.relative_to(one)) for f in one.rglob("*") if f.is_file())
    assert names == sorted(str(f.relative_to(other)) for f in other.rglob("*") if f.is_file())
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    return names
