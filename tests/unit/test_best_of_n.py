"""Best-of-N: selecting, judging, and the paired interval."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreamprm_dist.evaluation.best_of_n import (
    CandidateScores,
    aggregate_candidates,
    clustered_bootstrap,
    judge,
    select,
)
from dreamprm_dist.prm.aggregation import AGGREGATIONS

scores_lists = st.lists(st.floats(0, 1), min_size=1, max_size=8)


def candidates(
    question: int,
    scores: list[list[float]],
    answers: list[str | None],
    right: list[bool],
    subject: str = "",
) -> list[CandidateScores]:
    rows = zip(scores, answers, right, strict=True)
    return [
        CandidateScores(question, f"q{question}", i, subject, *row) for i, row in enumerate(rows)
    ]


def votes(answers: list[str | None], right: list[bool]) -> float:
    group = candidates(0, [[0.5]] * len(answers), answers, right)
    return judge(group)["accuracy"]["self_consistency"]


# --- select ----------------------------------------------------------------------------------


@given(scores_lists)
def test_select_is_the_first_of_the_highest(scores: list[float]) -> None:
    chosen = select(scores)
    assert scores[chosen] == max(scores)
    assert max(scores) not in scores[:chosen]


@given(scores_lists, st.randoms())
def test_select_follows_a_permutation(scores: list[float], random) -> None:
    order = list(range(len(scores)))
    random.shuffle(order)
    assert scores[order[select([scores[i] for i in order])]] == scores[select(scores)]


def test_select_refuses_nan_and_nothing() -> None:
    with pytest.raises(ValueError, match="candidate 1"):
        select([0.9, math.nan, 0.1])
    with pytest.raises(ValueError, match="no candidates"):
        select([])


# --- judge -----------------------------------------------------------------------------------


def test_judge_closed_form() -> None:
    group = [
        # mean chooses candidate 1 (right), min 0 (wrong), last 1 (right)
        *candidates(0, [[0.5, 0.5], [0.3, 0.9]], ["A", "B"], [False, True], "physics"),
        # everything chooses candidate 0 (right)
        *candidates(4, [[0.9], [0.2], [0.1]], ["C", "D", "D"], [True, False, False], "art"),
        # no right candidate
        *candidates(7, [[0.1], [0.2]], [None, None], [False, False], "art"),
    ]
    results = judge(group, ["mean", "min", "last"])
    assert results["num_questions"] == 3
    assert results["num_candidates"] == 7
    assert results["num_unparsed"] == 2
    assert results["question_ids"] == ["q0", "q4", "q7"]
    assert results["question_images"] == [[], [], []]
    assert results["first_correct"] == [False, True, False]
    assert results["selected_correct"] == {
        "mean": [True, True, False],
        "min": [False, True, False],
        "last": [True, True, False],
    }
    accuracy = results["accuracy"]
    assert accuracy["first"] == pytest.approx(1 / 3)
    assert accuracy["random"] == pytest.approx((1 / 2 + 1 / 3) / 3)
    assert accuracy["self_consistency"] == 0  # A before B; D has the majority; nobody votes
    assert accuracy["oracle"] == pytest.approx(2 / 3)
    assert accuracy["prm"] == pytest.approx({"mean": 2 / 3, "min": 1 / 3, "last": 2 / 3})
    art = results["by_subject"]["art"]
    assert list(results["by_subject"]) == ["art", "physics"]
    assert (art["num_questions"], art["num_candidates"], art["num_unparsed"]) == (2, 5, 2)
    assert art["accuracy"]["prm"]["mean"] == 0.5


def test_judge_covers_every_aggregation_by_default() -> None:
    results = judge(candidates(0, [[0.5]], ["A"], [True]))
    assert list(results["accuracy"]["prm"]) == list(AGGREGATIONS)
    assert "by_subject" not in results


def test_judge_gives_ties_to_the_first() -> None:
    group = candidates(0, [[0.5, 0.7], [0.5, 0.7]], ["A", "B"], [True, False])
    assert set(judge(group)["accuracy"]["prm"].values()) == {1.0}
    group = candidates(0, [[0.5, 0.7], [0.5, 0.7]], ["A", "B"], [False, True])
    assert set(judge(group)["accuracy"]["prm"].values()) == {0.0}


def test_judge_refuses_nan_unknown_names_and_nothing() -> None:
    with pytest.raises(ValueError, match="not a number"):
        judge(candidates(0, [[0.5], [math.nan]], ["A", "B"], [True, False]))
    with pytest.raises(ValueError, match="choose from"):
        judge(candidates(0, [[0.5]], ["A"], [True]), ["avg"])
    with pytest.raises(ValueError, match="nothing to judge"):
        judge([])


@pytest.mark.parametrize(
    ("answers", "right", "accuracy"),
    [
        (["A", "B", "B"], [False, True, True], 1),
        (["A", "A", "B"], [False, False, True], 0),
        (["B", "A", "A", "B"], [True, False, False, True], 1),  # tie: B appears first
        (["A", "B"], [False, True], 0),  # tie: A appears first
        ([None, None, "B"], [False, False, True], 1),  # unparsed candidates do not vote
        ([None, None], [True, True], 0),  # nobody votes: wrong, whatever the labels say
        (["A", "A"], [True, False], 1),  # the first candidate with the answer decides
        (["A", "A"], [False, True], 0),
    ],
)
def test_self_consistency(answers: list, right: list[bool], accuracy: float) -> None:
    assert votes(answers, right) == accuracy


@given(
    st.lists(
        st.tuples(st.sampled_from(["A", "B", None]), st.booleans(), scores_lists),
        min_size=1,
        max_size=6,
    ),
    st.randoms(),
)
def test_no_choice_beats_the_oracle_and_random_ignores_order(rows: list, random) -> None:
    answers, right, scores = (list(column) for column in zip(*rows, strict=True))
    accuracy = judge(candidates(0, scores, answers, right))["accuracy"]
    others = [accuracy["first"], accuracy["self_consistency"], *accuracy["prm"].values()]
    assert max(others) <= accuracy["oracle"]
    random.shuffle(rows)
    answers, right, scores = (list(column) for column in zip(*rows, strict=True))
    shuffled = judge(candidates(0, scores, answers, right))["accuracy"]
    assert shuffled["random"] == accuracy["random"]
    assert shuffled["oracle"] == accuracy["oracle"]


def test_aggregate_candidates() -> None:
    values = aggregate_candidates([[0.5, 0.25], [0.4]], ["mean", "product"])
    assert values["mean"] == pytest.approx([0.375, 0.4], rel=1e-15)
    assert values["product"] == pytest.approx([0.125, 0.4], rel=1e-15)


# --- clustered_bootstrap ---------------------------------------------------------------------


def test_bootstrap_of_a_constant_has_no_width() -> None:
    assert clustered_bootstrap([0.25] * 8, list("aabbccdd"), 200) == (0.25, 0.25, 0.25)


def test_bootstrap_matches_the_normal_interval() -> None:
    values = np.random.default_rng(0).normal(0.1, 1.0, 400)
    mean, low, high = clustered_bootstrap(values, range(400))
    half = 1.96 * values.std() / 20
    assert mean == pytest.approx(values.mean())
    # Monte Carlo error of a 2.5 % percentile from 10,000 samples is about 2.7 % of the standard
    # error; 6 % of the half width is more than four of it.
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.06 * half)


def test_bootstrap_resamples_whole_clusters() -> None:
    values = np.random.default_rng(0).normal(size=50)
    repeated, clusters = np.repeat(values, 4), np.repeat(np.arange(50), 4).tolist()
    # Copies of a question add nothing when they share a cluster, but would halve the interval
    # when taken for questions of their own.
    clustered = clustered_bootstrap(repeated, clusters, 2000)
    assert clustered == pytest.approx(clustered_bootstrap(values, range(50), 2000))
    naive = clustered_bootstrap(repeated, range(200), 2000)
    assert naive[2] - naive[1] < 0.6 * (clustered[2] - clustered[1])


def test_bootstrap_weighs_clusters_by_their_size() -> None:
    mean, low, high = clustered_bootstrap([1, 1, 1, 0], ["a", "a", "a", "b"], 1000)
    assert (mean, low, high) == (0.75, 0.0, 1.0)


def test_bootstrap_depends_on_the_seed_alone() -> None:
    values = [0, 1, 1, 0, -1]
    assert clustered_bootstrap(values, range(5), 100) == clustered_bootstrap(values, range(5), 100)


def test_bootstrap_refuses_lengths_that_differ() -> None:
    with pytest.raises(ValueError, match="2 differences and 1 clusters"):
        clustered_bootstrap([0, 1], ["a"])
    with pytest.raises(ValueError, match="0 differences"):
        clustered_bootstrap([], [])
