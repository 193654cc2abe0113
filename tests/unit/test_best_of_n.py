"""Best-of-N: selecting, judging, and the paired interval."""

import math
from statistics import fmean

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
from dreamprm_dist.evaluation.compare import BASICS
from dreamprm_dist.evaluation.results import QuestionOutcome
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


def accuracy(group: list[CandidateScores]) -> dict[str, float]:
    """Accuracies of all methods and aggregations."""
    judged = judge(group)
    return judged.accuracies() | {
        name: fmean(getattr(question, name) for question in judged.questions) for name in BASICS
    }


def votes(answers: list[str | None], right: list[bool]) -> float:
    group = candidates(0, [[0.5]] * len(answers), answers, right)
    return accuracy(group)["self_consistency"]


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
    judged = judge(group, ["mean", "min", "last"])
    assert judged.questions[1] == QuestionOutcome(
        id="q4",
        images=[],
        subject="art",
        first=True,
        random=1 / 3,
        self_consistency=False,
        oracle=True,
    )
    assert [question.id for question in judged.questions] == ["q0", "q4", "q7"]
    assert [question.first for question in judged.questions] == [False, True, False]
    assert judged.correct == {
        "mean": [True, True, False],
        "min": [False, True, False],
        "last": [True, True, False],
    }
    assert judged.accuracies() == pytest.approx({"mean": 2 / 3, "min": 1 / 3, "last": 2 / 3})
    found = accuracy(group)
    assert found["first"] == pytest.approx(1 / 3)
    assert found["random"] == pytest.approx((1 / 2 + 1 / 3) / 3)
    assert found["self_consistency"] == 0  # A before B; D has the majority; nobody votes
    assert found["oracle"] == pytest.approx(2 / 3)


def test_judge_covers_every_aggregation_by_default() -> None:
    judged = judge(candidates(0, [[0.5]], ["A"], [True]))
    assert list(judged.correct) == list(AGGREGATIONS)


def test_judge_gives_ties_to_the_first() -> None:
    group = candidates(0, [[0.5, 0.7], [0.5, 0.7]], ["A", "B"], [True, False])
    assert set(judge(group).accuracies().values()) == {1.0}
    group = candidates(0, [[0.5, 0.7], [0.5, 0.7]], ["A", "B"], [False, True])
    assert set(judge(group).accuracies().values()) == {0.0}


def test_judge_refuses_nan_unknown_names_and_nothing() -> None:
    with pytest.raises(ValueError, match="not a number"):
        judge(candidates(0, [[0.5], [math.nan]], ["A", "B"], [True, False]))
    with pytest.raises(ValueError, match="choose from"):
        judge(candidates(0, [[0.5]], ["A"], [True]), ["avg"])
    with pytest.raises(ValueError, match="nothing to judge"):
        judge([])


@pytest.mark.parametrize(
    ("answers", "right", "expected"),
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
def test_self_consistency(answers: list, right: list[bool], expected: float) -> None:
    assert votes(answers, right) == expected


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
    found = accuracy(candidates(0, scores, answers, right))
    others = [value for name, value in found.items() if name != "random"]
    assert max(others) <= found["oracle"]
    random.shuffle(rows)
    answers, right, scores = (list(column) for column in zip(*rows, strict=True))
    shuffled = accuracy(candidates(0, scores, answers, right))
    assert shuffled["random"] == found["random"]
    assert shuffled["oracle"] == found["oracle"]


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_what_could_not_be_scored_is_not_chosen_while_anything_else_can_be(name: str) -> None:
    """Not even before a candidate of score 0, and of several that tie."""
    scores = aggregate_candidates([None, [0.0], None, [0.0, 0.0]], [name])[name]
    assert scores[0] == scores[2] == -math.inf and scores[1] == scores[3] > -math.inf
    assert select(scores) == 1
    scored = [CandidateScores(0, "", i, "", s, "A", i < 1) for i, s in enumerate([None, [0.1]])]
    assert judge(scored, [name]).correct[name] == [False]


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
