"""A rank that hangs or is killed while others wait for it is named."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from started_run import free_port

WORLD_SIZE = 4


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
    shared = {"WORLD_SIZE": str(WORLD_SIZE), "MASTER_ADDR": "127.0.0.1"}
    shared["MASTER_PORT"] = str(free_port())
    worker = Path(__file__).with_name("roll_call_worker.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, str(worker), str(4 / 60)],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD_SIZE)
    ]
    try:
        for process in ranks:
            assert process.stdout.readline() == "begun\n"
        for rank in lost:
            ranks[rank].send_signal(how)
        said = {r: ranks[r].communicate(timeout=60)[1] for r in range(WORLD_SIZE) if r not in lost}
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    for rank, text in said.items():
        expected = rank_0_says if rank == 0 else "rank 0 does not answer"
        assert f"rank {rank} waited for the others in vain: {expected}" in text, text
