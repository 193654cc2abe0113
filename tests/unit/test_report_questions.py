"""The report's questions: images, candidates, the scores of steps, and who picked what."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dreamprm_dist.evaluation.best_of_n import CandidateScores, aggregate_candidates
from dreamprm_dist.evaluation.compare import compare
from dreamprm_dist.evaluation.results import write_results
from dreamprm_dist.report.demo import write_demo_report
from dreamprm_dist.report.overview import write_run_report

HOSTILE = "</p><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
Change = Callable[[list[dict]], object]


@pytest.fixture
def demo(tiny_data_dir: Path, tiny_shards: Path, tmp_path: Path) -> Path:
    """A demo's folder: its data, its shards, a run with weights, an evaluation of two PRMs."""
    folder = tmp_path / "demo"
    shutil.copytree(tiny_data_dir, folder / "data")
    shutil.copytree(tiny_shards / "train", folder / "shards" / "train" / "train")
    (folder / "summary.json").write_text('{"accuracy": {"baseline": 0.5}}')
    run = folder / "instance_table"
    (run / "export").mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"iteration": 1, "lower_loss": 1}\n')
    table = pd.DataFrame({"sample_id": range(64), "weight": np.linspace(0, 1, 64)})
    table.to_parquet(run / "export" / "instance_weights.parquet")
    evaluate(folder)
    return folder


def evaluate(folder: Path, questions: Change = len, scores: Change = len) -> None:
    """`good` is right about each step, `bad` about none; both files may be changed on the way."""
    path = folder / "data" / "test.json"
    records = json.loads(path.read_text())
    questions(records)
    path.write_text(json.dumps(records))
    prms, lines = {}, []
    for label, right in (("bad", 0.0123), ("good", 0.9876)):
        prms[label] = [
            CandidateScores(
                question=q,
                question_id=record["id"],
                candidate=c,
                subject=record["subject"],
                step_scores=[right if step == "+" else 1 - right for step in labels],
                answer=str(c),
                true_false=record["true_false"][c],
            )
            for q, record in enumerate(records)
            for c, labels in enumerate(record["step_labels"])
        ]
        for candidate in prms[label]:
            totals = aggregate_candidates([candidate.step_scores]).items()
            aggregates = {name: values[0] for name, values in totals}
            lines.append({"prm": label} | asdict(candidate) | {"aggregates": aggregates})
    scores(lines)
    out = folder / "evaluation"
    out.mkdir(exist_ok=True)
    results = compare(prms, {"bad": "last", "good": "mean"})
    write_results(out / "results.json", replace(results, test_json_file=str(path)))
    (out / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def cards(page: str) -> list[str]:
    found = re.findall('<article class="instance">.*?</article>', page, re.DOTALL)
    return [card for card in found if "candidates" in card]


def test_the_demo_says_that_its_images_are_handwritten_digits(demo: Path):
    page = write_demo_report(demo).read_text()
    assert "real handwritten digits" in page
    records = json.loads((demo / "data" / "test.json").read_text())
    truth = json.loads((demo / "data" / "truth.json").read_text())
    flipped = sum(t["flipped"] for t in truth)
    assert f"of {len(truth)} solutions {flipped} have every label flipped" in page
    found = cards(page)
    assert len(found) == 4 and page.count("<img ") == 4 + 8
    for card, record in zip(found, records, strict=False):
        assert record["question"] in card and record["id"] in card
        assert 'src="data:image/webp;base64,' in card
        assert card.count("✓ right") == sum(record["true_false"])
        for candidate in record["candidates"]:
            for step in candidate.removeprefix("[Reasoning]\n").split("\n\n"):
                assert f"<span>{step}</span>" in card


def test_steps_have_the_scores_of_the_best_prm_and_picks_those_of_all(demo: Path):
    record = json.loads((demo / "data" / "test.json").read_text())[0]
    card = cards(write_demo_report(demo).read_text())[0]
    found = re.findall("<b>(0[.][0-9]+)</b>", card)
    assert found == [
        "0.988" if label == "+" else "0.012" for labels in record["step_labels"] for label in labels
    ]
    picks = re.findall("(✓ right|✗ wrong)</b>, [^,]*, (★ picked by [^<]*|not picked)", card)
    rights = [sum(label == "+" for label in labels) for labels in record["step_labels"]]
    best = rights.index(max(rights))
    worst = next(i for i, labels in enumerate(record["step_labels"]) if labels[-1] == "-")
    assert "Good" in picks[best][1] and "Bad" in picks[worst][1]


def test_the_truth_stands_at_the_ends_of_the_weights(demo: Path):
    page = write_demo_report(demo).read_text()
    truth = json.loads((demo / "data" / "truth.json").read_text())
    shown = re.findall(r"In truth: ([^<]*)<", page)
    order = [*range(63, 59, -1), *range(4)]
    said = {True: "every label is flipped.", False: "labels as made."}
    assert shown == [said[truth[i]["flipped"]] for i in order]


def unscored(lines: list[dict]) -> None:
    for line in lines:
        if line["question"] == 0 and line["candidate"] == 0:
            line.update(step_scores=None, error=HOSTILE, aggregates=dict.fromkeys("ab"))


def test_a_candidate_without_scores_says_why(demo: Path):
    evaluate(demo, scores=unscored)
    page = write_demo_report(demo).read_text()
    assert "not scored: &lt;/p&gt;&lt;script&gt;" in cards(page)[0] and "<script" not in page
    assert re.findall("<b>(?:✓ right|✗ wrong)</b>, not scored[^★]*, not picked", cards(page)[0])


def changed(**fields: object) -> Change:
    return lambda records: [record.update(fields) for record in records]


@pytest.mark.parametrize(
    "change",
    [
        changed(question=HOSTILE),
        changed(id=HOSTILE),
        changed(subject=HOSTILE),
        changed(image_path=HOSTILE),
        changed(image_path=["x/../" * 9 + HOSTILE, "images"]),
        changed(candidates=[f"{HOSTILE}\n\n{HOSTILE}\n\nAnswer: {HOSTILE}"] * 4),
    ],
)
def test_hostile_questions_stay_text(demo: Path, change: Change):
    evaluate(demo, questions=change)
    page = write_demo_report(demo).read_text()
    run = demo / "instance_table"
    page += write_run_report(
        [run], demo / "run.html", demo / "evaluation" / "results.json"
    ).read_text()
    assert "<script" not in page and "<img src=x" not in page
    assert "&lt;script&gt;alert(1)" in page


@pytest.mark.parametrize("word", ["w" * 9000, "ä" * 9000, "字" * 9000, "a b " * 4000, "\n" * 9000])
def test_long_texts_are_shortened_and_keep_their_ends(demo: Path, word: str):
    change = changed(question=f"first{word}last", id=word or "x")
    evaluate(demo, questions=change)
    page = write_demo_report(demo).read_text()
    assert len("".join(cards(page))) < 40_000
    assert page.count("first") >= 4 and re.search("last</h3>", page)


GONE = {
    "scores.jsonl": "there is no",
    "results.json": "there is no",
    "../data/test.json": "there is no",
}


@pytest.mark.parametrize("name", GONE)
def test_what_is_gone_is_said(demo: Path, name: str):
    (demo / "evaluation" / name).unlink()
    page = write_demo_report(demo).read_text()
    assert f"cannot be shown: there is no {demo}" in page and not cards(page)


def test_questions_that_changed_since_are_not_shown_with_old_scores(demo: Path):
    path = demo / "data" / "test.json"
    records = json.loads(path.read_text())
    changes = ({"candidates": ["x"], "true_false": [True], "step_labels": None},
               {"candidates": ["one step"] * 4, "step_labels": None})  # fmt: skip
    for change in changes:
        path.write_text(json.dumps([record | change for record in records]))
        page = write_demo_report(demo).read_text()
        assert "Questions cannot be shown" in page and not cards(page)
    (demo / "evaluation" / "scores.jsonl").write_text('{"prm": 1}\n')
    with pytest.raises(ValueError, match=r"is no scores\.jsonl"):
        write_demo_report(demo)


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"<svg/>"])
def test_a_broken_image_is_said(demo: Path, data: bytes):
    record = json.loads((demo / "data" / "test.json").read_text())[0]
    (demo / "data" / record["image_path"]).write_bytes(data)
    assert "(image cannot be shown)" in cards(write_demo_report(demo).read_text())[0]
    (demo / "data" / record["image_path"]).unlink()
    assert "no such file" in cards(write_demo_report(demo).read_text())[0]
