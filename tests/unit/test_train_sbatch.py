"""What the batch script for training hands on to its step."""

import os
import subprocess
from pathlib import Path

import pytest

TRAIN = Path(__file__).resolve().parents[2] / "launch" / "slurm" / "train.sbatch"


@pytest.mark.parametrize(
    ("given", "alloc"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "a:1"}, "a:1"),
        ({"PYTORCH_ALLOC_CONF": "b:2"}, "b:2"),
    ],
)
def test_a_task_has_the_jobs_cpus_and_an_allocator_that_grows(tmp_path: Path, given, alloc):
    """`srun` stands in for Slurm's and notes what it is given."""
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\necho "$PYTORCH_CUDA_ALLOC_CONF" "$@"\nmkdir "$RUN/export"\n')
    srun.chmod(0o755)
    run = tmp_path / "run"
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RUN": str(run), "PYTHON": "python"}
    env |= {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "6"} | given
    subprocess.run(["bash", str(TRAIN), "--lr", "2e-5"], env=env, check=True)
    set_to, *arguments = (run / "slurm-7.log").read_text().split()
    assert set_to == alloc
    assert "--cpus-per-task=6" in arguments[: arguments.index("python")]
    assert arguments[-2:] == ["--lr", "2e-5"]
