"""Ranks that wait for each other: one that hangs or is killed is named, one that is late is not."""

import signal
from pathlib import Path

import pytest
from started_run import started_ranks

WORLD_SIZE = 4
LONG_WORK = """
import time
from dreamprm_dist import distributed

distributed.initialize("cpu", 1 / 60)
print(distributed.text_of_long_work(lambda: time.sleep(3) or "done"))
print(distributed.text_of_long_work(lambda: "again"))
distributed.shutdown()
"""
FAILED_WORK = """
from dreamprm_dist import distributed
from dreamprm_dist.errors import InputError

def fail():
    raise InputError("the file is bad")

with distributed.joined("cpu"):
    distributed.text_of_long_work(fail)
"""


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
    with started_ranks(str(worker), str(4 / 60), world_size=WORLD_SIZE) as ranks:
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
    with started_ranks("-c", LONG_WORK, world_size=2, seconds_between=3) as ranks:
        for process in ranks:
            out, error = process.communicate(timeout=240)
            assert (process.returncode, out) == (0, "done\nagain\n"), error


def test_long_work_that_fails_is_not_waited_for():
    with started_ranks("-c", FAILED_WORK, world_size=2) as ranks:
        said = [process.communicate(timeout=240)[1] for process in ranks]
        assert [process.returncode for process in ranks] == [2, 2]
    assert said[0] == "error: the file is bad\n"
    assert "error: rank 1 waited for rank 0 in vain: it has ended; look at its log\n" in said[1]
