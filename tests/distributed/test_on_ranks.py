"""The tests that two ranks run together, all in one start of them, which takes the longest."""

import subprocess
import sys
from pathlib import Path

from started_run import rank_environments

FOLDER = Path(__file__).parents[1] / "on_ranks"


def test_on_ranks(tmp_path: Path, tiny_prm_dir: Path, tiny_shards: Path, monkeypatch):
    monkeypatch.setenv("TESTS_ON_RANKS", f"{tiny_prm_dir}:{tiny_shards}")
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    ranks = []
    for rank, environment in enumerate(rank_environments(2)):
        with (tmp_path / f"log-{rank}").open("w") as log:
            start = [*command, str(FOLDER), "--basetemp", str(tmp_path / f"rank-{rank}")]
            ranks.append(
                subprocess.Popen(start, stdout=log, stderr=subprocess.STDOUT, env=environment)
            )
    codes = [rank.wait(timeout=900) for rank in ranks]
    logs = [(tmp_path / f"log-{rank}").read_text() for rank in range(2)]
    assert codes == [0, 0], "\n".join(log[-6000:] for log in logs)
