"""The comparison of PRMs against brute force, scikit-learn and closed forms."""

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss, roc_auc_score

from dreamprm_dist.errors import InputError
from dreamprm_dist.evaluation.best_of_n import CandidateScores, clustered_bootstrap, select
from dreamprm_dist.evaluation.compare import (
    BASICS,
    compare,
    expected_majority,
    expected_oracle,
    expected_selection,
    step_metrics,
)
from dreamprm_dist.evaluation.questions import Question, read_meta_questions, read_test_questions
from dreamprm_dist.evaluation.results import Results, read_results, write_results
from dreamprm_dist.evaluation.table import text_table
from dreamprm_dist.prm.aggregation import AGGREGATIONS

rows = st.lists(
    st.tuples(st.integers(0, 3), st.booleans(), st.sampled_from("AB")), min_size=1, max_size=6
)


@given(rows, st.integers(1, 8))
def test_expected_accuracies_are_means_over_all_subsets(values: list, n: int) -> None:
    scores, right, answers = zip(*values, strict=True)
    subsets = list(combinations(range(len(values)), min(n, len(values))))
    chosen = [right[s[select([scores[i] for i in s])]] for s in subsets]
    assert expected_selection(scores, right, n) == pytest.approx(np.mean(chosen))
    anyone = [any(right[i] for i in s) for s in subsets]
    assert expected_oracle(right, n) == pytest.approx(np.mean(anyone))
    group = [CandidateScores(0, "", i, "", [0.5], answers[i], right[i]) for i in range(len(values))]
    assert expected_majority(group, 1) == pytest.approx(np.mean(right))


def test_expected_majority_of_many_subsets_is_drawn_without_replacement() -> None:
    """924 subsets of 6 of 12, of which 200 are drawn: the same ones each time."""
    answers = ["A", "A", *"BCDEFGHIJK"]
    group = [
        CandidateScores(0, "", i, "", [0.5], answer, answer == "A")
        for i, answer in enumerate(answers)
    ]
    # Right when an A is drawn: two are the majority, and one ties with all, but comes first.
    exact = 1 - (10 * 9 * 8 * 7 * 6 * 5) / (12 * 11 * 10 * 9 * 8 * 7)
    found = expected_majority(group, 6)
    assert found == expected_majority(group, 6)
    assert found == pytest.approx(exact, abs=3 * (exact * (1 - exact) / 200) ** 0.5)


def candidates(seed: int, skill: float, shift: int = 0) -> list[CandidateScores]:
    """40 questions of 4 candidates about 20 images, by a PRM that is right as often as `skill`."""
    truth, noise = np.random.default_rng(0), np.random.default_rng(seed)
    result = []
    for question in range(40):
        for index in range(4):
            right = bool(truth.random() < 0.4)
            score = skill * right + (1 - skill) * noise.random()
            result.append(
                CandidateScores(
                    question,
                    str(question),
                    index,
                    "art" if question % 3 else "physics",
                    [score, (score + 1) / 2],
                    "A" if right else "B",
                    right,
                    [f"{question // 2}.png"],
                    ["+" if right else "-", None],
                )
            )
    return result


@pytest.fixture(scope="module")
def compared() -> Results:
    prms = {"bad": candidates(1, 0.0), "good": candidates(2, 0.9)}
    return compare(prms, {"bad": "mean", "good": "min"})


def test_table_and_differences(compared: Results) -> None:
    prms = [f"{label}, {name}" for label in ("bad", "good") for name in AGGREGATIONS]
    methods = ["first", "random", "self_consistency", *prms, "oracle"]
    assert [row.method for row in compared.table] == methods
    assert (compared.num_questions, compared.num_candidates, compared.num_unparsed) == (40, 160, 0)
    table = {row.method: row for row in compared.table}
    assert table["good, mean"].accuracy == table["oracle"].accuracy
    assert table["first"].over_first_interval_95 == [0, 0]
    clusters = [tuple(question.images) for question in compared.questions]
    good = np.array(compared.prms["good"].correct["min"], float)
    first = np.array([question.first for question in compared.questions], float)
    mean, *interval = clustered_bootstrap(good - first, clusters)
    row = table["good, min"]
    assert (row.over_first, row.over_first_interval_95) == (mean, interval)
    (between,) = compared.between
    bad = np.array(compared.prms["bad"].correct["mean"], float)
    assert (between.prm, between.over) == ("good", "bad")
    assert between.difference == pytest.approx((good - bad).mean())
    assert between.interval_95[0] > 0


def test_accuracies_are_means_of_the_outcomes(compared: Results) -> None:
    for name, value in compared.accuracies().items():
        assert value == pytest.approx(np.mean([getattr(q, name) for q in compared.questions]))
    for label, prm in compared.prms.items():
        means = {name: np.mean(correct) for name, correct in prm.correct.items()}
        assert compared.accuracies(label) == pytest.approx(means)
        assert list(means) == list(AGGREGATIONS)


def test_accuracy_against_n_joins_random_and_the_table(compared: Results) -> None:
    table = {row.method: row.accuracy for row in compared.table}
    curves = compared.by_n
    assert list(curves) == ["1", "2", "3", "4"]
    for name, row in (("good", "good, min"), ("bad", "bad, mean"), ("oracle", "oracle")):
        assert curves["1"][name] == pytest.approx(table["random"])
        assert curves["4"][name] == pytest.approx(table[row])
    assert curves["4"]["self_consistency"] == pytest.approx(table["self_consistency"])
    assert curves["1"]["good"] < curves["2"]["good"] < curves["4"]["good"]


def test_by_subject(compared: Results) -> None:
    subjects = compared.by_subject
    assert {name: row["num_questions"] for name, row in subjects.items()} == {
        "art": 26,
        "physics": 14,
    }
    total = sum(row["num_questions"] * row["good"] for row in subjects.values()) / 40
    assert total == pytest.approx(compared.accuracies("good")["min"])
    assert list(subjects["art"]) == ["num_questions", *BASICS, "bad", "good"]


def test_permuting_candidates_changes_nothing_else() -> None:
    prms = {"a": candidates(1, 0.3), "b": candidates(2, 0.6)}
    order = np.random.default_rng(3)
    shuffles = {q: order.permutation(4) for q in range(40)}
    permuted = {
        label: [rows[4 * q + i] for q in range(40) for i in shuffles[q]]
        for label, rows in prms.items()
    }
    before, after = (compare(p, {"a": "mean", "b": "last"}) for p in (prms, permuted))
    # Votes may be tied, and then the answer that appears first wins: that is its definition.
    assert before.between == after.between
    for old, new in zip(before.by_n.values(), after.by_n.values(), strict=True):
        assert old | {"self_consistency": 0} == new | {"self_consistency": 0}
    for old, new in zip(before.table, after.table, strict=True):
        if old.method not in ("first", "self_consistency"):
            assert (old.accuracy, old.interval_95) == (new.accuracy, new.interval_95)


def test_step_metrics_are_scikit_learns() -> None:
    generator = np.random.default_rng(0)
    # Rounded, so that scores tie; none lies on the edge of a bin.
    scores = 0.9 * generator.random((50, 3)).round(1) + 0.05
    labels = generator.random((50, 3)) < 0.6
    group = [
        CandidateScores(
            0, "", 0, "", s.tolist(), None, True, [], ["+" if x else "-" for x in y[:2]] + [None]
        )
        for s, y in zip(scores, labels, strict=True)
    ]
    found = step_metrics(group)
    flat = labels[:, :2].ravel(), scores[:, :2].ravel()
    assert found.num_steps == 100
    assert found.auroc == pytest.approx(roc_auc_score(*flat))
    assert found.brier == pytest.approx(brier_score_loss(*flat))
    assert sum(b["count"] for b in found.bins) == 100
    counts = np.bincount((flat[1] * 10).astype(int), minlength=10).tolist()
    assert [b["count"] for b in found.bins] == [count for count in counts if count]
    gaps = [b["count"] * abs(b["score"] - b["right"]) for b in found.bins]
    assert found.calibration_error == pytest.approx(sum(gaps) / 100)


def test_perfect_calibration_and_steps_of_one_kind() -> None:
    group = [CandidateScores(0, "", 0, "", [1.0, 1.0], None, True, [], ["+", "+"])]
    found = step_metrics(group)
    assert (found.auroc, found.calibration_error, found.brier) == (None, 0, 0)
    assert step_metrics([CandidateScores(0, "", 0, "", [1.0], None, True)]) is None


def test_text_table(compared: Results) -> None:
    text = text_table(replace(compared, chosen_on="meta.json"))
    for part in ("good, min*", "bad, mean*", "good over bad: +", "physics", "AUROC", "meta.json"):
        assert part in text
    assert "good, mean*" not in text and "bad, min*" not in text


# --- results.json ------------------------------------------------------------------------------


def test_results_come_back_as_they_were_written(compared: Results, tmp_path: Path) -> None:
    results = replace(
        compared,
        models={"bad": "runs/bad/export", "good": "runs/góod/export"},
        meta_accuracy={"bad": {"mean": 0.25}},
        num_rejected=3,
    )
    results.prms["bad"].steps = None
    write_results(tmp_path / "results.json", results)
    assert read_results(tmp_path / "results.json") == results
    text = (tmp_path / "results.json").read_text(encoding="utf-8")
    assert text.startswith('{\n  "format_version": 1,\n  "models": {\n') and "góod" in text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"format_version": 2},
            "version 2, but this release reads 1; run launch/evaluate.py again",
        ),
        ({"format_version": None}, "format version None"),
        ({"table": [{"method": "first"}]}, "no results.json of launch/evaluate.py.*; run it again"),
        ({"table": None}, "no results.json"),
        ({"prms": []}, "no results.json"),
        ({"extra": 1}, "no results.json"),
    ],
)
def test_other_files_are_refused(
    compared: Results, tmp_path: Path, change: dict, says: str
) -> None:
    file = tmp_path / "results.json"
    write_results(file, compared)
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError, match=f"^{file}.* {says}"):
        read_results(file)


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"table": []}', "\x80"])
def test_files_that_are_none_are_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "results.json"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=f"^{file} is no results.json of launch/evaluate.py, or"):
        read_results(file)


# --- questions ---------------------------------------------------------------------------------


def test_step_labels_and_meta_groups(tmp_path) -> None:
    good = (
        '{"question": "Q", "candidates": ["A\\n\\nB"], "true_false": [true], "step_labels": %s}\n'
    )
    file = tmp_path / "test.jsonl"
    labels = ['[["+", null]]', '[["+"]]', '["+-"]', '[["+", "?"]]', "[]"]
    file.write_text("".join(good % text for text in labels))
    first, *others = read_test_questions(str(file))
    assert isinstance(first, Question) and first.step_labels == [["+", None]]
    says = ["1 labels for 2 steps", "list of '+'", "list of '+'", "one list per candidate"]
    for (line, _, reason), (number, word) in zip(others, enumerate(says, 2), strict=True):
        assert line == number and word in reason

    meta = (
        '{"id": "%s", "true_false": %s, "response": "Answer: %s", "conversations": ['
        '{"from": "human", "value": "%s"}, {"from": "human", "value": "s"}, '
        '{"from": "gpt", "value": "+"}]}\n'
    )
    records = [("1", "true", "A", "Q"), ("-1", "true", "B", "P"), ("1", "false", "B", "Q")]
    records += [("-1", "false", "C", "R")]
    # VisualPRM's own format: the first step is in the question's turn.
    records += [("7", "true", "A", "Q\\n\\n### Solution Process:\\nOne"), ("7", "false", "B", "Q")]
    file.write_text("".join(meta % record for record in records))
    questions = read_meta_questions(str(file), tmp_path)
    assert [q.true_false for q in questions] == [[True, False], [True], [False], [True, False]]
    assert questions[0].answers == ["A", "B"] and questions[0].line == 1
    file.write_text(meta % records[0] + meta % records[1])
    with pytest.raises(ValueError, match="one solution per question"):
        read_meta_questions(str(file), tmp_path)
    file.write_text(meta % records[0] + "{}\n")
    with pytest.raises(ValueError, match="record 2"):
        read_meta_questions(str(file), tmp_path)


def test_answers_of_multiple_choice_are_letters(tmp_path) -> None:
    candidates = ["Answer: B", "Answer: (B) a whale", "Answer: a whale", "Answer: (A) or (B)"]
    record = {"question": "Q", "candidates": candidates, "true_false": [True] * 4}
    file = tmp_path / "test.jsonl"
    file.write_text(json.dumps(record | {"options": ["a fox", "a whale"]}) + "\n")
    (question,) = read_test_questions(str(file))
    assert question.answers == ["B", "B", "B", None]
    file.write_text(json.dumps(record) + "\n")
    (question,) = read_test_questions(str(file))
    assert question.answers == ["B", "(b) a whale", "whale", "(a) or (b)"]


def test_renaming_images_changes_nothing() -> None:
    prms = {"a": candidates(1, 0.3), "b": candidates(2, 0.6)}
    before = compare(prms, {"a": "mean", "b": "last"})
    for rows in prms.values():
        for row in rows:
            row.images = [f"renamed/{int(row.images[0].removesuffix('.png')) * 7 % 23}.jpg"]
    after = compare(prms, {"a": "mean", "b": "last"})
    assert replace(before, questions=[]) == replace(after, questions=[])  # they hold the names
