"""A run that is stopped, killed or damaged and started again is the run that never stopped."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from started_run import (
    FLAGS,
    ITERATIONS,
    TRAIN,
    Run,
    differing_files,
    export_differences,
    metric_differences,
)

from dreamprm_dist.training.checkpoint_files import MANIFEST


class GhostRun(Run):
    """One whose hypergradient is read from the optimizer's state too, and every batch has one."""

    def __init__(self, folder: Path, model: Path, shards: Path):
        super().__init__(folder, model, shards)
        self.data += "--hypergradient ghost --precondition adam --unroll_window all".split()


@pytest.fixture(scope="module")
def new_run(tmp_path_factory, tiny_prm_dir: Path, tiny_shards: Path):
    return lambda: GhostRun(tmp_path_factory.mktemp("resume"), tiny_prm_dir, tiny_shards)


@pytest.fixture(scope="module")
def whole(new_run) -> Run:
    """A run that nothing happened to."""
    run = new_run()
    run.finish()
    return run


@pytest.fixture(scope="module")
def stopped(new_run) -> Run:
    """A run that another one tried to join, and that was stopped by Ctrl-C.

    In a terminal all processes of all ranks hear of it.
    """
    run = new_run()
    with run.started() as ranks:
        run.wait_for(lambda: len(run.metrics()) >= 1, ranks)
        for process in ranks:  # it must not come to its end in the meantime
            os.killpg(process.pid, signal.SIGSTOP)
        command = [sys.executable, TRAIN, *FLAGS, *run.data]
        run.second_start = subprocess.run(
            list(map(str, command)), cwd=run.folder, capture_output=True, text=True, check=False
        )
        for process in ranks:
            os.killpg(process.pid, signal.SIGCONT)
            os.killpg(process.pid, signal.SIGINT)
        run.exit_codes = [process.wait(timeout=120) for process in ranks]
        run.first_rank = ranks[0].pid
    return run


@pytest.fixture(scope="module")
def killed(stopped: Run, new_run) -> Run:
    """The stopped run, started again, and killed with no checkpoint at its last iteration."""
    run = copy(stopped, new_run)
    with run.started() as ranks:
        run.wait_for(lambda: "bi-level: " in run.log(), ranks)  # metrics are those of before
        run.wait_for(lambda: len(run.metrics()) >= 7, ranks)
        for process in ranks:
            process.send_signal(signal.SIGKILL)
    assert not (run.run_folder / "export").exists()
    return run


def copy(run: Run, new_run) -> Run:
    other = new_run()
    shutil.copytree(run.run_folder, other.run_folder)
    return other


def assert_equal_runs(run: Run, whole: Run) -> None:
    exports = [each.run_folder / "export" for each in (run, whole)]
    assert not differing_files(*exports)
    assert {"instance_weights.parquet", "model.safetensors"} <= set(os.listdir(exports[0]))
    assert run.metrics() == whole.metrics()
    assert [line["iteration"] for line in run.metrics()] == list(range(1, ITERATIONS + 1))


def test_a_whole_run_keeps_its_newest_checkpoints_and_moves(whole: Run):
    assert whole.checkpoints() == [12, 14]
    folder = whole.run_folder / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["iteration-12", "iteration-14"]
    before, after = (load_file(path / "rank-1.safetensors") for path in sorted(folder.iterdir()))
    # Else any resume would look exact.
    assert (
        before["reweighter.shard-1.0.parameter"] != after["reweighter.shard-1.0.parameter"]
    ).any()
    assert len({line["lr"] for line in whole.metrics()}) > 2
    files = json.loads((folder / "iteration-14" / MANIFEST).read_text())["files"]
    written = {str(f.relative_to(folder / "iteration-14")) for f in folder.glob("*-14/**/*.*")}
    assert files.keys() == written - {MANIFEST}


def test_a_second_run_in_the_folder_is_refused(stopped: Run):
    assert stopped.second_start.returncode == 2
    (said,) = (x for x in stopped.second_start.stderr.splitlines() if x.startswith("error"))
    where = f"process {stopped.first_rank} on {socket.gethostname()}"
    assert said.startswith(f"error: run is in use by {where}; wait for its end")


def test_an_interrupted_run_saves_on_all_ranks_and_exits_with_0(stopped: Run):
    assert stopped.exit_codes == [0, 0], stopped.log()
    iteration = stopped.metrics()[-1]["iteration"]
    assert iteration < ITERATIONS
    assert stopped.checkpoints()[-1] == iteration
    assert not (stopped.run_folder / "export").exists()
    assert f"saved at iteration {iteration}: start the same command again" in stopped.log()
    assert "stopping after this iteration" in stopped.log()
    assert all("Traceback" not in stopped.log(rank) for rank in (0, 1))


def test_the_stopped_run_went_on_from_its_checkpoint(stopped: Run, killed: Run):
    assert f"resuming from run/checkpoints/iteration-{stopped.checkpoints()[-1]}" in killed.log()
    assert "damaged" not in killed.log()


def test_a_stopped_killed_and_damaged_run_ends_as_the_whole_one(killed: Run, whole: Run, new_run):
    """One bit of the newest checkpoint is flipped, so that the run goes on from the one before."""
    run = copy(killed, new_run)
    before, newest = run.checkpoints()[-2:]
    (file,) = (run.run_folder / "checkpoints" / f"iteration-{newest}").rglob("*_model_states.pt")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    run.finish()
    assert f"iteration-{newest} is damaged and skipped: the checksum of deepspeed/" in run.log()
    assert f"resuming from run/checkpoints/iteration-{before}" in run.log()
    assert_equal_runs(run, whole)
    assert run.checkpoints() == whole.checkpoints()
    for rank in (0, 1):  # rows, moments, RNG
        file = f"checkpoints/iteration-{ITERATIONS}/rank-{rank}.safetensors"
        assert (run.run_folder / file).read_bytes() == (whole.run_folder / file).read_bytes()


def test_it_goes_on_on_other_numbers_of_ranks(killed: Run, whole: Run, new_run, tmp_path: Path):
    """2 to 1, with other flags for how it is done; that 1 to 2; 2 to 4, with the data elsewhere."""
    one = copy(killed, new_run)
    one.finish("--keep_last", "9", "--num_workers", "0", num_ranks=1)
    assert "from 2 to 1 rank(s)" in one.log()
    assert "batch of 8 stays: now 1 rank(s) x batch_size 4 x gradient_accumulation 2" in one.log()
    two = copy(one, new_run)
    for iteration in (12, 14):
        shutil.rmtree(two.run_folder / "checkpoints" / f"iteration-{iteration}")
    two.finish()
    assert "from 1 to 2 rank(s)" in two.log()
    four = copy(killed, new_run)
    shards = shutil.copytree(killed.data[1], tmp_path / "train")
    four.finish("--train_json_file", str(shards), num_ranks=4)
    assert "now 4 rank(s) x batch_size 2 x gradient_accumulation 1" in four.log()
    for run in (one, two, four):
        found = export_differences(run, whole)
        found |= metric_differences(run.metrics(), whole.metrics())
        worst = sorted(found, key=found.get)[-5:]
        print({n: found[n] for n in worst})
        assert max(found.values()) < 1e-5


def test_the_last_checkpoint_is_the_same_model_on_any_number_of_ranks(whole: Run, new_run):
    """Nothing is left to do but to export: every row and parameter has its bits."""
    run = copy(whole, new_run)
    shutil.rmtree(run.run_folder / "export")
    run.finish(num_ranks=4)
    differing = differing_files(run.run_folder / "export", whole.run_folder / "export")
    assert differing == ["README.md"]  # which has the micro-batches


@pytest.fixture
def small_disk(tmp_path: Path, whole: Run) -> Iterator[Path]:
    """A file system with room for one checkpoint and a half."""
    checkpoint = (whole.run_folder / "checkpoints" / "iteration-12").rglob("*.*")
    size = sum(file.stat().st_size for file in checkpoint) * 3 // 2
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small disk needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(
    small_disk: Path, tiny_prm_dir: Path, tiny_shards: Path, whole: Run
):
    run = GhostRun(small_disk, tiny_prm_dir, tiny_shards)
    with run.started() as ranks:
        assert [process.wait(timeout=120) for process in ranks] == [2, 2]
    lines = [line for rank in (0, 1) for line in run.log(rank).splitlines()]
    (said,) = (line for line in lines if "error" in line)  # by one of them
    assert said.startswith("error: no checkpoint could be saved in run, where ")
    (kept,) = (run.run_folder / "checkpoints").iterdir()
    assert kept.name == "iteration-3"
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    run.finish()
    assert "resuming from run/checkpoints/iteration-3" in run.log() and "damaged" not in run.log()
    assert_equal_runs(run, whole)
    written = [json.loads(x) for x in (run.run_folder / "metrics.jsonl").read_text().splitlines()]
    sizes = {line["iteration"]: line.get("checkpoint_bytes") for line in written}
    files = (run.run_folder / "checkpoints" / "iteration-12").rglob("*.*")
    total = sum(file.stat().st_size for file in files if file.name != MANIFEST)
    # The line after the save has it; the one after iteration 3 was written by the first start.
    assert [i for i, size in sizes.items() if size] == [7, 10, 13] and sizes[13] == total


@pytest.fixture
def refused_run(refused, killed: Run, monkeypatch):
    """Starts the killed run's folder on one rank with other flags; returns the message."""
    monkeypatch.chdir(killed.folder)
    return lambda *flags: refused(TRAIN, *FLAGS, *killed.data, *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lr", "2e-3"], "was made with lr = 0.001, but now it is 0.002; set it back"),
        (["--iteration_num", "13"], "was made with iteration_num = 14, but now it is 13"),
        (["--resume", "never"], "already holds a run"),
    ],
    ids=["lr", "iteration_num", "never"],
)
def test_what_contradicts_the_checkpoint_is_refused(refused_run, flags, message):
    assert message in refused_run(*flags)


def test_other_data_under_the_same_flags_are_refused(refused_run, killed: Run, tmp_path: Path):
    shards = shutil.copytree(killed.data[1], tmp_path / "train")
    manifest = shards / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    assert "was made with train_json_file = shards" in refused_run("--train_json_file", str(shards))
