"""Ranks that wait for each other: one that hangs or is killed is named, one that is late is not."""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from started_run import rank_environments

WORLD_SIZE = 4
LONG_WORK = """
import time
from dreamprm_dist import distributed

distributed.initialize("cpu", 1 / 60)
print(distributed.text_of_long_work(lambda: time.sleep(3) or "done"))
distributed.shutdown()
"""


@contextlib.contextmanager
def started(
    *command: str, world_size: int, seconds_between: float = 0
) -> Iterator[list[subprocess.Popen]]:
    ranks = []
    for environment in rank_environments(world_size):
        time.sleep(seconds_between if ranks else 0)
        ranks.append(
            subprocess.Popen(
                [sys.executable, *command],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        yield ranks
    finally:
        for process in ranks:
            process.kill()
            process.wait()


@pytest.mark.parametrize(
    ("lost", "how", "rank_0_says"),
    [
        ([1, 3], signal.SIGSTOP, "rank 1, 3 does not answer"),
        ([2], signal.SIGKILL, "rank 2 does not answer"),
        ([0], signal.SIGSTOP, None),
    ],
    ids=["hang", "killed", "0-hangs"],
)
def test_it_is_named(lost: list[int], how: signal.Signals, rank_0_says: str | None):
    worker = Path(__file__).with_name("roll_call_worker.py")
    with started(str(worker), str(4 / 60), world_size=WORLD_SIZE) as ranks:
        for process in ranks:
            assert process.stdout.readline() == "begun\n"
        for rank in lost:
            ranks[rank].send_signal(how)
        said = {r: ranks[r].communicate(timeout=240)[1] for r in range(WORLD_SIZE) if r not in lost}
    for rank, text in said.items():
        expected = rank_0_says if rank == 0 else "rank 0 does not answer"
        assert f"rank {rank} waited for the others in vain: {expected}" in text, text


def test_a_late_start_and_long_work_of_rank_0_are_waited_for():
    """Both take three times as long as a collective waits."""
    with started("-c", LONG_WORK, world_size=2, seconds_between=3) as ranks:
        for process in ranks:
            out, error = process.communicate(timeout=240)
            assert (process.returncode, out) == (0, "done\n"), error
