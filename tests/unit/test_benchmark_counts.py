"""Counts at thresholds and their F1 scores, against loops, scikit-learn and written cases."""

from math import isnan, nan

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from dreamprm_dist.errors import InputError
from dreamprm_dist.evaluation.benchmarks.counts import (
    Outcomes,
    best_threshold,
    candidate_thresholds,
    first_error_outcomes,
    mean_of,
    step_f1,
    step_outcomes,
)
from dreamprm_dist.evaluation.benchmarks.measure import choose_threshold

step = st.tuples(st.sampled_from(["+", "-", None]), st.integers(0, 5).map(lambda i: i / 5))
solution = st.lists(step, min_size=1, max_size=5)
solutions = st.lists(st.tuples(st.integers(0, 1), solution), min_size=1, max_size=6)


def outcomes(of_solution, rows: list, num_groups: int = 2) -> Outcomes:
    parts = [(g, [label for label, _ in s], [score for _, score in s]) for g, s in rows]
    return Outcomes(of_solution, parts, num_groups)


def steps_counted(rows: list, threshold: float) -> list:
    """Per solution and group: right steps judged right and not, wrong ones judged wrong and not."""
    counts = np.zeros((len(rows), 2, 4))
    for i, (group, steps) in enumerate(rows):
        for label, score in steps:
            if label is not None:
                hit = (score >= threshold) == (label == "+")
                counts[i, group, {"+": 0, "-": 2}[label] + (not hit)] += 1
    return counts.tolist()


def solutions_counted(rows: list, threshold: float) -> list:
    """Per solution and group: correct ones judged well and not, erroneous ones likewise."""
    counts = np.zeros((len(rows), 2, 4))
    for i, (group, steps) in enumerate(rows):
        wrong = next((k for k, (label, _) in enumerate(steps) if label == "-"), -1)
        found = next((k for k, (_, score) in enumerate(steps) if score < threshold), -1)
        counts[i, group, (0 if wrong == -1 else 2) + (found != wrong)] += 1
    return counts.tolist()


@pytest.mark.parametrize(
    ("of_solution", "counted"),
    [(step_outcomes, steps_counted), (first_error_outcomes, solutions_counted)],
)
@given(solutions)
def test_counts_are_those_of_a_loop_at_every_threshold(of_solution, counted, rows: list) -> None:
    """At thresholds below, at, between and above all scores: a score that equals one is right."""
    found = outcomes(of_solution, rows)
    thresholds = np.arange(0.0, 1.25, 0.1)
    for threshold in thresholds:
        assert found.counts(threshold).tolist() == counted(rows, threshold)
    sums = [found.counts(threshold).sum(0).tolist() for threshold in thresholds]
    assert found.sweep(thresholds).tolist() == sums


@given(solutions.filter(lambda rows: any(label for _, s in rows for label, _ in s)))
def test_f1_is_that_of_scikit_learn(rows: list) -> None:
    steps = [(label, score) for _, s in rows for label, score in s if label]
    truth, judged = [y == "+" for y, _ in steps], [score >= 0.5 for _, score in steps]
    found = step_f1(outcomes(step_outcomes, rows).counts(0.5).sum((0, 1)))
    right = f1_score(truth, judged, pos_label=True, zero_division=0)
    wrong = f1_score(truth, judged, pos_label=False, zero_division=0)
    assert found["f1_right"] == pytest.approx(right)
    assert found["f1_wrong"] == pytest.approx(wrong)
    assert found["macro_f1"] == pytest.approx((right + wrong) / 2)


def test_f1_of_written_counts() -> None:
    """3 of 4 right and 1 of 3 wrong steps found: F1 is 6 / (6 + 1 + 2) and 2 / (2 + 1 + 2)."""
    found = step_f1(np.array([[3, 1, 1, 2], [5, 0, 0, 0], [0, 0, 0, 2], [0, 0, 0, 0]]))
    assert found["f1_right"][:3] == pytest.approx([6 / 9, 1, 0])
    assert found["f1_wrong"][:3] == pytest.approx([2 / 5, 0, 0])
    # Of one kind only, one half at most, as published scripts have it.
    assert found["macro_f1"][:3] == pytest.approx([(6 / 9 + 2 / 5) / 2, 0.5, 0])
    assert all(isnan(values[3]) for values in found.values())


def test_a_score_at_the_threshold_counts_as_right() -> None:
    [[counts]] = outcomes(step_outcomes, [(0, [("+", 0.5), ("-", 0.5)])], 1).counts(0.5)
    assert counts.tolist() == [1, 0, 0, 1]
    [[counts]] = outcomes(first_error_outcomes, [(0, [("+", 0.9), ("-", 0.5)])], 1).counts(0.5)
    assert counts.tolist() == [0, 0, 0, 1]  # no step is below: no error is found


def test_candidate_thresholds_divide_in_every_way() -> None:
    assert candidate_thresholds([0.4, 0.2, 0.4, 1.0]) == pytest.approx([0, 0.3, 0.7, 1])
    assert candidate_thresholds([0.4]) == pytest.approx([0, 0.7])
    # 1 is a threshold of its own where it is a score: at most what equals it is right.
    assert candidate_thresholds([1.0]) == pytest.approx([0, 1])


def test_of_equally_good_thresholds_the_one_nearest_to_one_half() -> None:
    thresholds = np.array([0.1, 0.4, 0.7])
    assert best_threshold(np.array([0.8, 0.8, 0.3]), thresholds) == 0.4
    assert best_threshold(np.array([0.8, nan, 0.9]), thresholds) == 0.7


@given(solutions)
def test_the_chosen_threshold_is_the_best_there_is(rows: list) -> None:
    labelled = [([y for y, _ in s], [score for _, score in s]) for _, s in rows]
    kinds = {y for labels, _ in labelled for y in labels} - {None}
    if len(kinds) < 2:
        with pytest.raises(InputError, match="right and wrong steps"):
            choose_threshold(labelled)
        return
    threshold, value = choose_threshold(labelled)
    found = outcomes(step_outcomes, rows)
    macro = [
        step_f1(found.counts(t).sum((0, 1)))["macro_f1"]
        for t in (threshold, *np.arange(0, 1.01, 0.05))
    ]
    assert value == pytest.approx(macro[0]) and value >= max(macro[1:]) - 1e-12


def test_means_are_over_what_is_there() -> None:
    rows = [
        {"a": np.array([1.0, nan]), "b": np.array(nan)},
        {"a": np.array([3.0, 5.0]), "b": np.array(nan)},
    ]
    found = mean_of(rows)
    assert found["a"].tolist() == [2, 5] and isnan(found["b"])
