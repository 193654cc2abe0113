"""A whole evaluation in this process, by a PRM whose scores are chosen here."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from dreamprm_dist.errors import InputError, RecordError
from dreamprm_dist.evaluation import run
from dreamprm_dist.evaluation.results import Results, read_results
from dreamprm_dist.evaluation.run import EvaluateConfig, evaluate
from dreamprm_dist.evaluation.scoring import Scorer

# Steps of a candidate as their scores: of these two, min and last prefer the first, all others the
# second.
EVEN, UNEVEN = (0.6, 0.6), (0.9, 0.5)


class Reader(Scorer):
    """Gives each step the score that is its text; where one is no number there is no score."""

    def __init__(self) -> None:
        pass

    def score_conversations(self, conversations, images) -> list[list[float] | RecordError]:
        def score(turns) -> list[float] | RecordError:
            steps = [step["value"] for step, turn in pairwise(turns) if turn["from"] == "gpt"]
            try:
                return list(map(float, steps)) or RecordError("no step")
            except ValueError:
                return RecordError(f"{steps[0]!r} is too long")

        return list(map(score, conversations))


@pytest.fixture
def judged(tmp_path: Path, monkeypatch):
    """Runs an evaluation of test and meta records; returns its text and results, if any."""
    monkeypatch.setattr(run, "load_tokenizer", lambda model: None)
    monkeypatch.setattr(EvaluateConfig, "load", lambda *_: Reader())

    def judged(
        test: list[dict], meta: list[dict] | None = None, **more: object
    ) -> tuple[str, Results | None]:
        files = {"test_json_file": tmp_path / "test.json", "meta_json_file": tmp_path / "meta.json"}
        for path, records in zip(files.values(), (test, meta or []), strict=True):
            path.write_text(json.dumps(records))
        flags = {name: str(path) for name, path in files.items()}
        if meta is None:
            flags["meta_json_file"] = None
        out = tmp_path / "out"
        text = evaluate(
            EvaluateConfig(
                model=["prm=nowhere"],
                out=str(out),
                device="cpu",
                aggregation_function="mean" if meta is None else "meta",
                **flags,
                **more,
            )
        )
        return text, read_results(out / "results.json") if out.exists() else None

    return judged


def test_record(right: tuple, wrong: tuple, **more: object) -> dict:
    candidates = ["\n\n".join(map(str, steps)) for steps in (wrong, right)]
    return {"question": "Q", "candidates": candidates, "true_false": [False, True], **more}


test_record.__test__ = False


def meta_records(right: tuple, wrong: tuple) -> list[dict]:
    return [
        {
            "id": "7",
            "true_false": is_right,
            "conversations": [
                {"from": speaker, "value": value}
                for score in steps
                for speaker, value in (("human", str(score)), ("gpt", None))
            ],
        }
        for steps, is_right in ((wrong, False), (right, True))
    ]


def test_the_aggregation_is_chosen_on_the_meta_set(judged, tmp_path: Path) -> None:
    """There `min` is best; on the test set it is always wrong, and `mean` always right."""
    test = [test_record(right=UNEVEN, wrong=EVEN)] * 3
    text, results = judged(test, meta_records(right=EVEN, wrong=UNEVEN))
    assert results.prms["prm"].aggregation == "min"
    assert results.chosen_on == str(tmp_path / "meta.json")
    on_test, on_meta = results.accuracies("prm"), results.meta_accuracy["prm"]
    assert (on_meta["min"], on_meta["mean"]) == (1, 0)
    assert (on_test["min"], on_test["mean"]) == (0, 1)
    # And it stands for the PRM wherever there is one number for it.
    assert [row["prm"] for row in results.by_n.values()] == [0.5, 0]
    assert "prm, min*" in text and "prm, mean*" not in text
    _, results = judged(test)
    assert results.prms["prm"].aggregation == "mean" and results.meta_accuracy == {}


def test_steps_without_a_label_do_not_count(judged, tmp_path: Path) -> None:
    record = test_record(right=(0.9, 0.5), wrong=(0.8, 0.2))
    labels = [["+", "-"], ["+", "-"]]
    unlabelled = [[None, "-"], ["+", None]]
    text, results = judged([record | {"step_labels": unlabelled}])
    steps = results.prms["prm"].steps
    assert (steps.num_steps, steps.auroc) == (2, 1)
    assert steps.brier == pytest.approx(((1 - 0.9) ** 2 + 0.2**2) / 2)
    assert "prm, 2 labelled steps" in text
    lines = (tmp_path / "out" / "scores.jsonl").read_text().splitlines()
    assert [json.loads(line)["step_labels"] for line in lines] == unlabelled
    _, everything = judged([record | {"step_labels": labels}])
    assert everything.prms["prm"].steps.num_steps == 4
    assert everything.table == results.table  # labels of steps choose nothing
    text, results = judged([record | {"step_labels": [[None, None], [None, None]]}])
    assert results.prms["prm"].steps is None and "labelled steps" not in text


def test_a_meta_question_that_cannot_be_scored_ends_it(judged, tmp_path: Path) -> None:
    meta = meta_records(right=EVEN, wrong=UNEVEN)
    meta = [record | {"image": "none.png"} for record in meta]
    with pytest.raises(InputError, match=r"meta.json, record 1: prm cannot score .*none.png"):
        judged([test_record(right=UNEVEN, wrong=EVEN)], meta)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_candidate_that_cannot_be_scored_is_not_chosen(judged, tmp_path: Path) -> None:
    """Neither is it left out: first, random, oracle and self-consistency are what they were."""
    bad = ["", " \n", "endless\n\nAnswer: A", "[Reasoning]\n", "\u3000"]
    test = [
        {"question": "Q", "candidates": [text, "0.1", "0.2"], "true_false": [True, True, False]}
        for text in bad
    ]
    text, results = judged(test)
    assert (results.num_questions, results.num_candidates) == (5, 15)
    assert (results.num_rejected, results.num_unscored) == (0, 5)
    assert set(results.accuracies("prm").values()) == {0}
    basics = {name: row.accuracy for row in results.table if not row.prm for name in [row.method]}
    assert (basics["first"], basics["random"], basics["oracle"]) == (1, pytest.approx(2 / 3), 1)
    by_n = results.by_n
    # One drawn alone is what there is; of two the right ones win in one pair of three.
    assert by_n["1"]["prm"] == by_n["1"]["random"] and by_n["2"]["prm"] == pytest.approx(1 / 3)
    assert "5 candidates could not be scored" in text
    rows = lines(tmp_path / "out" / "scores.jsonl")
    assert [row["candidate"] for row in rows] == [0, 1, 2] * 5
    for row in rows:
        if row["candidate"]:
            assert row["error"] is None and row["step_scores"]
            assert None not in row["aggregates"].values()
        else:
            assert row["error"] and row["step_scores"] is None
            assert set(row["aggregates"].values()) == {None}


def test_a_question_of_which_no_candidate_can_be_scored_is_rejected(judged, tmp_path) -> None:
    none = {"question": "Q", "candidates": ["", "endless"], "true_false": [True, False]}
    text, results = judged([none, test_record(right=UNEVEN, wrong=EVEN)])
    assert (results.num_questions, results.num_rejected, results.num_unscored) == (1, 1, 0)
    (row,) = lines(tmp_path / "out" / "rejected.jsonl")
    assert row["line"] == 1 and "no candidate can be scored; the first: no step" in row["reason"]
    assert "could not be scored" not in text


@pytest.mark.parametrize(("limit", "questions"), [(None, 3), (1, 1), (2, 1), (3, 2), (9, 3)])
def test_limit(judged, limit: int | None, questions: int) -> None:
    good = test_record(right=UNEVEN, wrong=EVEN)
    _, results = judged([good, {"id": "bad"}, good, good], limit=limit)
    assert results.num_questions == questions
    assert results.num_rejected == (limit != 1)


def test_dry_run_says_what_would_be_scored_and_writes_nothing(judged, tmp_path: Path) -> None:
    good = test_record(right=UNEVEN, wrong=EVEN)
    test, meta = [good, {"id": "bad"}, good, good], meta_records(EVEN, UNEVEN)
    text, _ = judged(test, meta, dry_run=True, limit=3)
    assert (
        "test.json: 2 questions with 4 candidates, 1 records rejected, the first at line 2" in text
    )
    assert "meta.json: 1 questions with 2 candidates" in text and "prm: nowhere" in text
    assert not (tmp_path / "out").exists()


RAW = {"question": "Q", "steps_with_score": []}


@pytest.mark.parametrize(
    ("test", "meta", "says"),
    [
        (RAW, None, "at line 1: it is a raw record of VisualPRM400K"),
        (meta_records(EVEN, UNEVEN)[0], None, "at line 1: it is a training or meta record"),
        ({"question": "Q"}, None, "at line 1: it is a question without solutions"),
        (test_record(EVEN, UNEVEN), RAW, "meta.json, record 1: it is a raw record"),
        (test_record(EVEN, UNEVEN), test_record(EVEN, UNEVEN), "record 1: it is a test record"),
    ],
)
def test_a_file_of_another_kind_is_named(judged, test: dict, meta: dict | None, says: str) -> None:
    with pytest.raises(InputError, match=says):
        judged([test] * 2, meta and [meta] * 2)
