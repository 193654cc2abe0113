"""The batch scripts on a real Slurm: one controller and two nodes, all on this machine."""

import contextlib
import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from started_run import FLAGS, ITERATIONS, consecutive_ports

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job waits for its credentials to expire; 5 seconds are the fewest that Slurm takes.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,batch_sched_delay=0
MpiDefault=none
NodeName=node[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}]
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def wait_until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.1)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[Callable[..., str]]:
    """Runs one of Slurm's commands and returns what it prints."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed (Debian: slurm-wlm and munge)")
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    config = folder / "slurm.conf"
    names = {"host": socket.gethostname(), "user": getpass.getuser(), "folder": folder}
    config.write_text(CONFIG.format(ports=consecutive_ports(3), **names))
    environment = os.environ | {
        # What the ranks need on nodes whose names no resolver knows.
        **{"SLURM_CONF": str(config), "MASTER_ADDR": "127.0.0.1", "PYTHON": sys.executable},
        "PYTHONPATH": str(ROOT),
    }
    munge = {"key-file": key, "socket": folder / "munge.socket", "pid-file": folder / "munge.pid"}
    munge |= {"log-file": folder / "munge.log", "seed-file": folder / "munge.seed"}
    daemons = [
        ["munged", "--foreground", "--force", *(f"--{k}={v}" for k, v in munge.items())],
        ["slurmctld", "-D"],
        *(["slurmd", "-D", "-N", node] for node in ("node1", "node2")),
    ]
    started = []
    for command in daemons:
        log = (folder / f"{command[0]}-{len(started)}.out").open("w")
        started.append(
            subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        )
        if command[0] == "munged":
            wait_until(munge["socket"].exists, "munged did not start")

    def run(*command: str, **variables: Path | str) -> str:
        strings = {name: str(value) for name, value in variables.items()}
        done = subprocess.run(
            [str(part) for part in command],
            **{"env": environment | strings, "cwd": ROOT, "capture_output": True, "text": True},
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def nodes_are_up() -> bool:
        with contextlib.suppress(AssertionError):  # the controller is not up yet
            return "idle" in run("sinfo", "-h", "-o", "%A/%t")
        return False

    try:
        wait_until(nodes_are_up, "no node came up")
        yield run
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(timeout=30)


def test_training_saves_at_the_signal_requeues_itself_and_finishes(
    slurm, tmp_path: Path, tiny_prm_dir: Path, tiny_shards: Path
):
    run = tmp_path / "run"
    flags = FLAGS[: FLAGS.index("--weights_path")] + FLAGS[FLAGS.index("--weights_path") + 2 :]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"reward_model: {tiny_prm_dir}\n")
    job = slurm(
        *("sbatch", "--parsable", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0"),
        *(f"--output={tmp_path}/out", "launch/slurm/train.sbatch", *flags),
        **{"RUN": run, "CONFIG": recipe, "TRAIN": tiny_shards / "train"},
        META=tiny_shards / "meta",
    ).strip()
    metrics, log = run / "metrics.jsonl", run / f"slurm-{job}.log"

    def text(file: Path) -> str:
        return file.read_text(errors="replace") if file.exists() else ""

    wait_until(lambda: text(metrics).count("\n") >= 2, "the run did not begin: " + text(log))
    slurm("scancel", "--signal=USR1", job)
    wait_until((run / "export").exists, "no export: " + text(log))
    wait_until(lambda: not slurm("squeue", "-h", "-j", job), "the job did not end")
    told = slurm("scontrol", "show", "job", job)
    assert "JobState=COMPLETED" in told and "Restarts=1" in told and "NodeList=node[1-2]" in told
    said = text(log)
    assert said.count("stopped by a signal; saved at iteration") == 1
    assert said.count("resuming from ") == 1
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(1, ITERATIONS + 1))
    assert lines[0]["epoch"] == 2 * 8 / 64  # two ranks of four, two steps


def test_data_are_sharded_and_a_model_evaluated(
    slurm, tmp_path: Path, tiny_data_dir: Path, tiny_prm_dir: Path
):
    out, evaluation = tmp_path / "shards", tmp_path / "evaluation"

    def batch(*arguments: str, **variables: Path | str) -> None:
        """Run a batch script to its end; `sbatch --wait` looks for that every half minute only."""
        options = ("--parsable", "--cpus-per-task=1", f"--output={tmp_path}/out")
        job = slurm("sbatch", *options, *arguments, **variables).strip()
        wait_until(lambda: not slurm("squeue", "-h", "-j", job), "the job did not end")
        assert "JobState=COMPLETED" in slurm("scontrol", "show", "job", job)

    data = {"TRAIN": tiny_data_dir / "train.json", "META": tiny_data_dir / "meta.json"}
    batch("launch/slurm/shard_data.sbatch", **data, OUT=out, NUM_SHARDS="4")
    assert sum(pq.read_metadata(file).num_rows for file in out.glob("train/*.parquet")) == 64
    batch(
        *("--gpus-per-node=0", "launch/slurm/evaluate.sbatch"),
        *("--model", f"tiny={tiny_prm_dir}", "--device", "cpu", "--precision", "fp32"),
        **{"TEST": tiny_data_dir / "test.json", "OUT": evaluation, "PROCESSES": "2"},
    )
    assert json.loads((evaluation / "results.json").read_text())
    assert "tiny" in next(evaluation.glob("slurm-*.log")).read_text()
