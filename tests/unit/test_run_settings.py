"""Whether a checkpoint or a run folder is the same run's."""

import hashlib
from pathlib import Path

import pytest
import yaml

from dreamprm_dist.data.shards import ShardFolder
from dreamprm_dist.training import resume
from dreamprm_dist.training.checkpoint import Checkpoint
from dreamprm_dist.training.config import parse_train_config
from dreamprm_dist.training.given_weights import weight_files


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


@pytest.mark.parametrize(
    "flags", [["--initial_weights"], ["--reweighter", "fixed", "--instance_weights"]]
)
def test_a_file_of_weights_is_compared_by_its_content(flags, tiny_shards: Path, tmp_path: Path):
    def settings(name: str, content: bytes) -> dict:
        (tmp_path / name).write_bytes(content)
        config = parse_train_config([*flags, str(tmp_path / name)])
        return resume.run_settings(config, ShardFolder(tiny_shards / "train"), None)

    name = flags[-1].removeprefix("--")
    first = settings("a", b"weights")
    assert first == settings("b", b"weights") != settings("a", b"others")
    assert first[name] == f"a file with SHA-256 {hashlib.sha256(b'weights').hexdigest()}"
    without = parse_train_config([])
    assert (
        not {"initial_weights", "instance_weights"}
        & resume.run_settings(without, ShardFolder(tiny_shards / "train"), None).keys()
    )
    with pytest.raises(ValueError, match=f"{name} gone is no file; give a Parquet file"):
        weight_files(parse_train_config([*flags, "gone"]).reweighter)


def test_a_run_without_a_checkpoint_may_be_older_than_a_flag_too(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(resume, "newest_checkpoint", lambda folder: None)
    older = parse_train_config(["--lr", "1e-3"]).as_dict()
    del older["meta_error"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(older))
    metrics = tmp_path / "metrics.jsonl"
    metrics.touch()
    same = parse_train_config(["--lr", "1e-3"])
    assert resume.checkpoint_to_resume(same, {}, metrics) is None
    for flags in (["--lr", "1e-3", "--meta_error", "absolute"], ["--lr", "2e-3"]):
        with pytest.raises(ValueError, match="already holds a run"):
            resume.checkpoint_to_resume(parse_train_config(flags), {}, metrics)
