"""A rank that hangs ends the run with its name."""

import signal
from pathlib import Path

from started_run import Run


def test_training_names_a_rank_that_hangs(tmp_path: Path, tiny_prm_dir: Path, tiny_shards: Path):
    run = Run(tmp_path, tiny_prm_dir, tiny_shards)
    with run.started("--collective_timeout", "0.15") as ranks:
        run.wait_for(lambda: len(run.metrics()) >= 2, ranks)
        ranks[1].send_signal(signal.SIGSTOP)
        assert ranks[0].wait(timeout=100) == 2
    said = "error: rank 0 waited for the others in vain: rank 1 does not answer"
    assert said in run.log()
    assert len(run.metrics()) < 14
