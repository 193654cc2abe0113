"""Scored parts on disk: kept for what they were scored with, refused for anything else."""

from pathlib import Path

import pytest
from accelerate import PartialState

from dreamprm_dist.evaluation.score_journal import ScoreJournal

BEFORE = {"model a": ["a", 1], "precision": "fp32"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A scored question of PRM `a`, and half a line."""
    parts = ScoreJournal(tmp_path / "parts", BEFORE)
    assert parts.start(PartialState(cpu=True)) == {}
    parts.write(("a", 0), {"scores": [[0.5]]})
    parts.close()
    with (parts.folder / "rank0.jsonl").open("a") as file:
        file.write('{"key": ["a", 1')
    return parts.folder


@pytest.mark.parametrize(
    "settings",
    [BEFORE, BEFORE | {"model b": ["b", 2]}, {"model b": ["b", 2], "precision": "fp32"}],
    ids=["the same", "one PRM more", "another PRM"],
)
def test_another_prm_costs_no_score(folder: Path, settings: dict) -> None:
    parts = ScoreJournal(folder, settings)
    assert parts.start(PartialState(cpu=True)) == {("a", 0): {"scores": [[0.5]]}}
    parts.close()
    with pytest.raises(ValueError, match="with another model a;"):
        ScoreJournal(folder, settings | {"model a": ["a", 3]})


def test_other_settings_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="with another model a and precision;"):
        ScoreJournal(folder, {"model a": ["a", 3], "precision": "bf16"})


def test_parts_without_a_score_refuse_nothing(folder: Path) -> None:
    (folder / "rank0.jsonl").unlink()
    assert ScoreJournal(folder, {"precision": "bf16"}).start(PartialState(cpu=True)) == {}
