"""A whole evaluation in this process, by a PRM whose scores are chosen here."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from dreamprm_dist.errors import InputError
from dreamprm_dist.evaluation import run
from dreamprm_dist.evaluation.results import Results, read_results
from dreamprm_dist.evaluation.run import EvaluateConfig, evaluate
from dreamprm_dist.evaluation.scoring import Scorer

# Steps of a candidate as their scores: of these two, min and last prefer the first, all others the
# second.
EVEN, UNEVEN = (0.6, 0.6), (0.9, 0.5)


class Reader(Scorer):
    """Gives each step the score that is its text."""

    def __init__(self) -> None:
        pass

    def score_conversations(self, conversations, images) -> list[list[float]]:
        return [
            [float(step["value"]) for step, turn in pairwise(turns) if turn["from"] == "gpt"]
            for turns in conversations
        ]


@pytest.fixture
def judged(tmp_path: Path, monkeypatch):
    """Runs an evaluation of test and meta records; returns its text and results."""
    monkeypatch.setattr(run, "load_tokenizer", lambda model: None)
    monkeypatch.setattr(EvaluateConfig, "load", lambda *_: Reader())

    def judged(test: list[dict], meta: list[dict] | None = None) -> tuple[str, Results]:
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
                output_dir=str(out),
                device="cpu",
                aggregation_function="mean" if meta is None else "meta",
                **flags,
            )
        )
        return text, read_results(out / "results.json")

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
