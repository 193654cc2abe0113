"""`deepspeed --hostfile` with two hosts, which are this machine by two names, over its own ssh."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from started_run import FLAGS, TRAIN, free_port

PROGRAMS = ("sshd", "ssh", "ssh-keygen", "pdsh")


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """One in which `ssh` reaches this machine, and this machine alone, without a password."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed (Debian: openssh-server and pdsh)")
    port = free_port()
    for name in ("host_key", "key"):
        subprocess.run(["ssh-keygen", "-q", "-N", "", "-f", tmp_path / name], check=True)
    (tmp_path / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {tmp_path}/host_key\nUsePAM no\n"
        f"AuthorizedKeysFile {tmp_path}/key.pub\nStrictModes no\nPidFile none\n"
    )
    (tmp_path / "ssh_config").write_text(
        f"Port {port}\nIdentityFile {tmp_path}/key\nStrictHostKeyChecking no\n"
        f"UserKnownHostsFile /dev/null\nLogLevel ERROR\nAddressFamily inet\n"
    )
    programs = tmp_path / "bin"
    programs.mkdir()
    ssh = programs / "ssh"  # its user's own configuration is found by no variable
    ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {tmp_path}/ssh_config "$@"\n')
    ssh.chmod(0o755)
    Path("/run/sshd").mkdir(exist_ok=True)  # where sshd insists on it
    command = [shutil.which("sshd"), "-D", "-e", "-f", str(tmp_path / "sshd_config")]
    with (tmp_path / "sshd.log").open("w") as log:
        server = subprocess.Popen(command, stderr=log)
    try:
        paths = (str(programs), str(Path(sys.executable).parent), os.environ["PATH"])
        variables = os.environ | {"PATH": os.pathsep.join(paths)}
        for _ in range(100):
            reached = subprocess.run([str(ssh), "localhost", "true"], check=False)
            if reached.returncode == 0:
                break
            time.sleep(0.1)
        yield variables
    finally:
        server.terminate()
        server.wait()


def test_two_hosts(environment, tmp_path: Path, tiny_shards: Path, tiny_prm_dir: Path):
    (tmp_path / "hosts").write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    (tmp_path / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\n")
    done = subprocess.run(
        [
            *("deepspeed", "--hostfile", "hosts", "--master_addr", "127.0.0.1"),
            *("--master_port", str(free_port()), TRAIN, *FLAGS),
            *("--train_json_file", tiny_shards / "train", "--reward_model", tiny_prm_dir),
            *("--meta_json_file", tiny_shards / "meta", "--iteration_num", "2"),
        ],
        **{"env": environment, "cwd": tmp_path, "capture_output": True, "text": True},
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "localhost: " in done.stdout + done.stderr
    assert "127.0.0.1: " in done.stdout + done.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [16 / 64, 32 / 64]  # two ranks of four
