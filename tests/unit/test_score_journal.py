"""Scored parts on disk: kept for what they were scored with, refused for anything else."""

from pathlib import Path

import pytest
from started_run import held_by_another

from dreamprm_dist.errors import InputError, RecordError
from dreamprm_dist.evaluation.score_journal import ScoreJournal

pytestmark = pytest.mark.usefixtures("one_rank")
BEFORE = {"model a": ["a", 1], "precision": "fp32"}
QUESTIONS = [(("a", i), i) for i in range(4)]


def started(folder: Path, settings: dict) -> ScoreJournal:
    journal = ScoreJournal(folder, settings)
    journal.start()
    return journal


def score(question: int) -> dict:
    if question == 1:
        raise RecordError("it has no step")
    return {"scores": [[question / 4]]}


@pytest.fixture
def folder(tmp_path: Path, one_rank: None) -> Path:
    """Two scored questions of PRM `a`, and half a line."""
    journal = started(tmp_path / "parts", BEFORE)
    assert list(journal.mine(QUESTIONS)) == QUESTIONS
    journal.score("a", QUESTIONS[:2], score)
    with (journal.folder / "rank0.jsonl").open("a") as file:
        file.write('{"key": ["a", 2')
    return journal.folder


def test_what_another_run_is_scoring_is_left_alone(folder: Path):
    before = {file.name: file.read_text() for file in folder.glob("*.jsonl")}
    with held_by_another(folder), pytest.raises(InputError, match="parts is in use by process "):
        started(folder, BEFORE)
    assert {file.name: file.read_text() for file in folder.glob("*.jsonl")} == before


@pytest.mark.parametrize(
    "settings",
    [BEFORE, BEFORE | {"model b": ["b", 2]}, {"model b": ["b", 2], "precision": "fp32"}],
    ids=["the same", "one PRM more", "another PRM"],
)
def test_another_prm_costs_no_score(folder: Path, settings: dict) -> None:
    journal = started(folder, settings)
    assert list(journal.mine(QUESTIONS)) == QUESTIONS[2:]
    with pytest.raises(InputError, match="with another model a;"):
        ScoreJournal(folder, settings | {"model a": ["a", 3]})


def test_other_settings_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="with another model a and precision;"):
        ScoreJournal(folder, {"model a": ["a", 3], "precision": "bf16"})


def test_parts_without_a_score_refuse_nothing(folder: Path) -> None:
    (folder / "rank0.jsonl").unlink()
    assert list(started(folder, {"precision": "bf16"}).mine(QUESTIONS)) == QUESTIONS


def test_the_folder_goes_when_all_is_written(folder: Path) -> None:
    journal = started(folder, BEFORE)
    journal.score("a", journal.mine(QUESTIONS), score)
    rows = {key: {"scores": [[i / 4]]} for key, i in QUESTIONS} | {
        ("a", 1): {"error": "it has no step"}
    }

    def fail(scored: dict) -> str:
        assert scored == rows
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        journal.finish(fail)
    assert folder.is_dir()
    journal = started(folder, BEFORE)
    assert list(journal.mine(QUESTIONS)) == []
    assert journal.finish(lambda scored: f"{len(scored)} rows") == "4 rows"
    assert not folder.exists()
