"""Whether a checkpoint is the same run's."""

from pathlib import Path

import pytest

from dreamprm_dist import resume
from dreamprm_dist.checkpoint import Checkpoint
from dreamprm_dist.config import parse_train_config


def test_a_flag_that_a_checkpoint_does_not_know_was_at_its_default(tmp_path: Path, monkeypatch):
    config = parse_train_config(["--lr", "1e-3"])
    settings = {"lr": 1e-3, "meta_error": "squared"}
    older = Checkpoint(tmp_path / "iteration-3", {"settings": {"lr": 1e-3}})
    monkeypatch.setattr(resume, "newest_checkpoint", lambda folder: older)
    metrics = tmp_path / "metrics.jsonl"
    assert resume.checkpoint_to_resume(config, settings, metrics) is older
    with pytest.raises(ValueError, match="with meta_error = squared, but now it is absolute"):
        resume.checkpoint_to_resume(config, settings | {"meta_error": "absolute"}, metrics)
    with pytest.raises(ValueError, match=r"with lr = 0\.001, but now it is 0\.002"):
        resume.checkpoint_to_resume(config, settings | {"lr": 2e-3}, metrics)
