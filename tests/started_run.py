"""A run on several ranks, each a process of its own, that tests start, hurt and start again."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.numpy import load_file

from dreamprm_dist.reweighters.base import HISTOGRAM_BINS

TRAIN = Path(__file__).resolve().parents[1] / "launch" / "train.py"
ITERATIONS = 14
# The folder of a run is its working directory, so that the exported model cards are equal too.
# Schedules of both kinds: one that is a function of the step and one that multiplies as it goes.
FLAGS = [
    *("--precision", "fp32", "--num_workers", "1", "--device", "cpu", "--weights_path", "run"),
    *("--batch_size", "4", "--meta_batch_size", "2", "--iteration_num", str(ITERATIONS)),
    *("--lr", "1e-3", "--scheduler_type", "step_lr", "--scheduler_step_size", "3"),
    *("--meta_lr", "0.1", "--save_every_iterations", "3", "--unroll_steps", "2"),
]


def free_port() -> int:
    return consecutive_ports(1)[0]


def consecutive_ports(count: int) -> list[int]:
    """Free ones that no other test process takes, nor the system for whoever asks for any."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        first = 17000 + 1000 * (worker % 13) + random.randrange(1000 - count)
        with contextlib.ExitStack() as probes, contextlib.suppress(OSError):
            for port in range(first, first + count):
                probes.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return list(range(first, first + count))


def rank_environments(num_ranks: int) -> list[dict[str, str]]:
    """What a launcher would give to the ranks of a new run on this machine."""
    shared = {"WORLD_SIZE": num_ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [
        os.environ | {k: str(v) for k, v in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
        for rank in range(num_ranks)
    ]


def run_on_ranks(world_size: int, *command: object) -> None:
    """Run a Python command under torchrun to its end, which is to be a good one."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", world_size]
    done = subprocess.run(
        [sys.executable, *map(str, [*launcher, *command])],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@contextlib.contextmanager
def started_ranks(
    *command: object, world_size: int, seconds_between: float = 0
) -> Iterator[list[subprocess.Popen]]:
    """Ranks that run a Python command; gone at the end of the block."""
    ranks = []
    for environment in rank_environments(world_size):
        time.sleep(seconds_between if ranks else 0)
        ranks.append(
            subprocess.Popen(
                [sys.executable, *map(str, command)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    with ended(ranks):
        yield ranks


@contextlib.contextmanager
def ended(ranks: list[subprocess.Popen]) -> Iterator[None]:
    """Have processes gone at the end of the block."""
    try:
        yield
    finally:
        for process in ranks:
            process.kill()
            process.wait()


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
        ranks = []
        for rank, environment in enumerate(rank_environments(num_ranks)):
            command = [sys.executable, TRAIN, *FLAGS, *self.data, *flags]
            log = self.folder / f"log-{rank}"
            ranks.append(self.start_rank([str(part) for part in command], environment, log))
        with ended(ranks):
            yield ranks

    def start_rank(
        self, command: list[str], environment: dict[str, str], log: Path
    ) -> subprocess.Popen:
        with log.open("w") as file:
            return subprocess.Popen(
                command,
                **{"stdout": file, "stderr": subprocess.STDOUT, "env": environment},
                cwd=self.folder,
                start_new_session=True,
            )

    def finish(self, *flags: str, num_ranks: int = 2) -> None:
        with self.started(*flags, num_ranks=num_ranks) as ranks:
            codes = [process.wait(timeout=900) for process in ranks]
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


HOLDER = """
import os, sys, time
from pathlib import Path
from dreamprm_dist.files import sole_use
with sole_use(Path(sys.argv[1])):
    if worker := os.fork():
        print(worker, flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def held_by_another(folder: Path) -> Iterator[tuple[subprocess.Popen, int]]:
    """A process that holds a folder, and the pid of a worker that it has forked."""
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        try:
            yield process, worker
        finally:
            process.kill()
            os.kill(worker, signal.SIGKILL)


def differing_files(one: Path, other: Path) -> list[str]:
    """Names of the files of two folders that are in one only, or whose bytes differ."""
    names = {str(f.relative_to(each)) for each in (one, other) for f in each.rglob("*.*")}
    files = {name: (one / name, other / name) for name in sorted(names)}
    return [
        name
        for name, pair in files.items()
        if not all(f.is_file() for f in pair) or pair[0].read_bytes() != pair[1].read_bytes()
    ]


def export_differences(run: Run, whole: Run) -> dict[str, float]:
    """Largest differences of weights and parameters, relative to the largest value of their kind.

    The keys' biases are left out: attention hardly depends on them, so that much of their gradient
    is rounding, of which AdamW makes whole steps.
    """
    folders = [each.run_folder / "export" for each in (run, whole)]
    table, expected = (pd.read_parquet(folder / "instance_weights.parquet") for folder in folders)
    assert table["sample_id"].equals(expected["sample_id"])
    found = {name: _relative(table[name], expected[name]) for name in ("raw_weight", "weight")}
    model, expected = (load_file(folder / "model.safetensors") for folder in folders)
    assert model.keys() == expected.keys()
    return found | {
        name: _relative(model[name], expected[name])
        for name in model
        if not name.endswith(".k_proj.bias")
    }


def metric_differences(lines: list[dict], expected: list[dict]) -> dict[str, float]:
    """Largest differences of metrics over iterations, relative to their largest value.

    A quantile of the weights is an edge of a bin of their histogram: rounding may put a weight
    into the next bin, and that much of a difference is none.
    """
    assert [line["iteration"] for line in lines] == [line["iteration"] for line in expected]
    found = {}
    for name in expected[0]:
        free: float | np.ndarray = 0.0
        if name.startswith("weight_q"):
            ranges = [line["weight_max"] - line["weight_min"] for line in expected]
            free = np.array(ranges) * 1.001 / HISTOGRAM_BINS  # the edges are rounded as well
        values = ([line[name] for line in each] for each in (lines, expected))
        found[name] = _relative(*values, free)
    return found


def _relative(a, b, free: float | np.ndarray = 0.0) -> float:
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return float((np.abs(a - b) - free).clip(0).max() / max(np.abs(b).max(), 1e-12))
