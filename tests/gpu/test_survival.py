"""A run on GPUs that is stopped, killed or moved, and goes on."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from devices import has_gpu, most_ranks, on_gpu, two_gpus
from started_run import ITERATIONS, Run, export_differences, metric_differences

pytestmark = [on_gpu, has_gpu]
FLAGS = ("--device", "cuda", "--precision", "fp32")
# In float32, on another device or number of ranks: on CPUs 1e-6 is seen. A lost moment, row or step
# of the schedule changes parameters by their learning rate, a hundredth.
TOLERANCE = 1e-3


class GpuRun(Run):
    """One that reads all that a checkpoint holds: rows, moments, schedules."""

    def __init__(self, folder: Path, model: Path, shards: Path):
        super().__init__(folder, model, shards)
        self.data += [*FLAGS, *"--hypergradient ghost --precondition adam".split()]

    def differences(self, other: "GpuRun") -> float:
        found = export_differences(self, other)
        return max((found | metric_differences(self.metrics(), other.metrics())).values())


@pytest.fixture(scope="module")
def new_run(tmp_path_factory, tiny_prm_dir: Path, tiny_shards: Path) -> Callable[[], GpuRun]:
    return lambda: GpuRun(tmp_path_factory.mktemp("survival"), tiny_prm_dir, tiny_shards)


@pytest.fixture(scope="module")
def whole(new_run) -> GpuRun:
    """A run that nothing happened to."""
    run = new_run()
    run.finish(num_ranks=most_ranks())
    return run


@pytest.fixture(scope="module")
def noise(new_run, whole: GpuRun) -> float:
    """What two runs that nothing happened to differ by: CUDA may add up in another order."""
    run = new_run()
    run.finish(num_ranks=most_ranks())
    difference = run.differences(whole)
    print(f"two runs alike differ by {difference:.1e}")
    assert difference < TOLERANCE
    return difference


def stop(run: GpuRun, num_ranks: int, more: int) -> None:
    """Start a run and end it after some iterations by SIGTERM, which Slurm sends to all ranks."""
    last = len(run.metrics()) + more
    with run.started(num_ranks=num_ranks) as ranks:
        run.wait_for(lambda: len(run.metrics()) >= last, ranks)
        for process in ranks:
            process.send_signal(signal.SIGTERM)
        assert [process.wait(timeout=120) for process in ranks] == [0] * num_ranks, run.log()
    assert run.checkpoints()[-1] == run.metrics()[-1]["iteration"] < ITERATIONS
    assert not (run.run_folder / "export").exists()


@pytest.fixture(scope="module")
def stopped(new_run) -> GpuRun:
    run = new_run()
    stop(run, most_ranks(), 4)
    return run


def copy(run: GpuRun, new_run) -> GpuRun:
    other = new_run()
    shutil.copytree(run.run_folder, other.run_folder)
    return other


def test_a_stopped_run_goes_on_as_if_it_had_not_been(stopped, whole, noise, new_run):
    """It may differ from it by ten times of what two runs that nothing happened to differ by."""
    run = copy(stopped, new_run)
    run.finish(num_ranks=most_ranks())
    assert f"resuming from run/checkpoints/iteration-{stopped.checkpoints()[-1]}" in run.log()
    assert run.differences(whole) <= max(10 * noise, 1e-5)
    first, last = whole.metrics()[0], whole.metrics()[-1]
    assert abs(first["lower_loss"] / last["lower_loss"] - 1) > TOLERANCE  # else any run would do


def test_it_goes_on_on_one_gpu_and_on_the_cpu(stopped, whole, new_run):
    for flags in ([], ["--device", "cpu"]):
        run = copy(stopped, new_run)
        run.finish(*flags, num_ranks=1)
        assert "resuming from run/checkpoints/iteration-" in run.log()
        assert run.differences(whole) < TOLERANCE, flags


@two_gpus
def test_it_goes_from_two_ranks_to_one_and_back(new_run):
    whole, moved = new_run(), new_run()
    whole.finish()
    stop(moved, 2, 3)
    stop(moved, 1, 3)
    assert "from 2 to 1 rank(s)" in moved.log()
    moved.finish()
    assert "from 1 to 2 rank(s)" in moved.log()
    assert moved.differences(whole) < TOLERANCE


@two_gpus
def test_when_a_rank_is_killed_the_others_end_and_the_run_goes_on(whole, new_run):
    """NCCL does not hear of a lost peer: its watchdog ends those that have waited too long."""
    run = new_run()
    with run.started("--collective_timeout", "0.5", num_ranks=most_ranks()) as ranks:
        run.wait_for(lambda: len(run.metrics()) >= 5, ranks)
        ranks[-1].kill()
        assert all(process.wait(timeout=240) != 0 for process in ranks[:-1])
    assert not (run.run_folder / "export").exists()
    run.finish(num_ranks=most_ranks())
    assert "resuming from run/checkpoints/iteration-" in run.log()
    assert run.differences(whole) < TOLERANCE


class OneGpuEach(GpuRun):
    """As under Slurm's `--gpus-per-task=1`: every rank sees its own GPU alone, as number 0."""

    def start_rank(self, command: list[str], environment: dict[str, str], log: Path):
        own = {"CUDA_VISIBLE_DEVICES": environment["RANK"]}
        return super().start_rank(command, environment | own, log)


@two_gpus
def test_every_rank_may_see_a_gpu_of_its_own_alone(
    whole, tmp_path: Path, tiny_prm_dir: Path, tiny_shards: Path
):
    run = OneGpuEach(tmp_path, tiny_prm_dir, tiny_shards)
    run.finish(num_ranks=most_ranks())
    assert run.differences(whole) < TOLERANCE


class LittleSharedMemory(GpuRun):
    """As in a container that nothing was said about: 64 MiB in /dev/shm."""

    IN_IT = "mount -t tmpfs -o size=64m tmpfs /dev/shm && exec"

    def start_rank(self, command: list[str], environment: dict[str, str], log: Path):
        inside = ["unshare", "--mount", "sh", "-c", f'{self.IN_IT} "$0" "$@"', *command]
        return super().start_rank(inside, environment, log)


def test_a_run_in_bf16_gets_along_with_little_shared_memory(
    tmp_path: Path, tiny_prm_dir: Path, tiny_shards: Path
):
    may = ["unshare", "--mount", "sh", "-c", f"{LittleSharedMemory.IN_IT} true"]
    if shutil.which("unshare") is None or subprocess.run(may, check=False).returncode:
        pytest.skip("a small /dev/shm needs the right to mount one")
    run = LittleSharedMemory(tmp_path, tiny_prm_dir, tiny_shards)
    run.finish("--precision", "bf16", "--num_workers", "2", num_ranks=1)
    assert len(run.metrics()) == ITERATIONS


ALONE = """
import torch
from dreamprm_dist import distributed
from dreamprm_dist.errors import InputError

with distributed.joined("cuda") as device:
    one = torch.ones(1, device=device)
    distributed.all_reduce_sum(one)
    if distributed.rank() == 1:
        raise InputError("rank 1 fails alone")
    distributed.all_reduce_sum(one)
"""


@two_gpus
def test_a_rank_that_fails_alone_says_so_and_ends_the_run(tmp_path: Path):
    (tmp_path / "alone.py").write_text(ALONE)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launcher, str(tmp_path / "alone.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1 and "error: rank 1 fails alone" in done.stderr
