"""Counts of right and wrong judgements at any threshold, and the F1 scores of them.

A step whose score is at least the threshold is judged right: a score equal to it counts as right.
So what is counted of a solution holds for the thresholds of an interval (low, high], and one list
of intervals gives the counts at a threshold and at all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import inf

import numpy as np

from dreamprm_dist.evaluation.benchmarks.base import Metrics

# The four columns of counts. Of steps: right ones judged right and wrong, wrong ones judged wrong
# and right. Of whole solutions: correct ones judged well and not, erroneous ones well and not.
RIGHT_HIT, RIGHT_MISSED, WRONG_HIT, WRONG_MISSED = range(4)


def step_outcomes(
    labels: Sequence[str | None], scores: Sequence[float]
) -> Iterator[tuple[int, float, float]]:
    """Each labelled step counts by itself.

    Yields:
        (column, low, high): the column counts one more at each threshold t with low < t <= high.
    """
    for label, score in zip(labels, scores, strict=True):
        if label == "+":
            yield RIGHT_HIT, -inf, score
            yield RIGHT_MISSED, score, inf
        elif label == "-":
            yield WRONG_HIT, score, inf
            yield WRONG_MISSED, -inf, score


def first_error_outcomes(
    labels: Sequence[str | None], scores: Sequence[float]
) -> Iterator[tuple[int, float, float]]:
    """A whole solution counts: it is judged well when its first wrong step is found.

    The predicted one is the first step judged wrong; a solution without a wrong step is judged well
    when no step is.

    Yields:
        As `step_outcomes`.
    """
    wrong = labels.index("-") if "-" in labels else None
    hit, missed = (RIGHT_HIT, RIGHT_MISSED) if wrong is None else (WRONG_HIT, WRONG_MISSED)
    low = -inf if wrong is None else scores[wrong]
    high = min(scores[:wrong], default=inf)
    if low < high:
        yield hit, low, high
        yield missed, -inf, low
        yield missed, high, inf
    else:
        yield missed, -inf, inf


class Outcomes:
    """What is counted of S solutions in G groups, at any threshold.

    Args:
        of_solution: gives the intervals of one, see `step_outcomes`.
        solutions: for each one its group's index, labels and scores.
        num_groups: G.
    """

    def __init__(
        self,
        of_solution: Callable,
        solutions: Sequence[tuple[int, Sequence[str | None], Sequence[float]]],
        num_groups: int,
    ):
        rows = [
            (index, group, *interval)
            for index, (group, labels, scores) in enumerate(solutions)
            for interval in of_solution(labels, scores)
        ]
        index, group, column, low, high = np.array(rows, dtype=np.float64).reshape(-1, 5).T
        self._place = (index.astype(int), group.astype(int), column.astype(int))
        self._low, self._high = low, high
        self._shape = (len(solutions), num_groups, 4)

    def counts(self, threshold: float) -> np.ndarray:
        """Counts of each solution at a threshold, shape (S, G, 4)."""
        counts = np.zeros(self._shape)
        holds = (self._low < threshold) & (threshold <= self._high)
        np.add.at(counts, tuple(part[holds] for part in self._place), 1)
        return counts

    def sweep(self, thresholds: np.ndarray) -> np.ndarray:
        """Counts over all solutions at each of T thresholds in rising order, shape (T, G, 4)."""
        changes = np.zeros((len(thresholds) + 1, *self._shape[1:]))
        _, group, column = self._place
        begin = np.searchsorted(thresholds, self._low, side="right")
        end = np.searchsorted(thresholds, self._high, side="right")
        np.add.at(changes, (begin, group, column), 1)
        np.add.at(changes, (end, group, column), -1)
        return changes[:-1].cumsum(axis=0)


def candidate_thresholds(scores: Sequence[float]) -> np.ndarray:
    """A threshold for each way in which one can divide scores in [0, 1], in rising order.

    The first divides none off; the others lie in the middle between neighbouring scores, the last
    between the highest and 1.
    """
    distinct = np.unique(np.asarray(scores, dtype=np.float64))
    above = np.append(distinct[1:], 1.0)
    return np.unique(np.concatenate([[0.0], (distinct + above) / 2]))


def best_threshold(values: np.ndarray, thresholds: np.ndarray) -> float:
    """The threshold of the highest value; of several the one nearest to 0.5."""
    at_best = thresholds[values == np.nanmax(values)]
    return float(at_best[np.abs(at_best - 0.5).argmin()])


def step_f1(counts: np.ndarray) -> Metrics:
    """F1 of finding the right steps, of finding the wrong ones, and their mean, macro-F1.

    Args:
        counts: (..., 4), of steps.

    Returns:
        Arrays of shape (...). F1 is 2 TP / (2 TP + FP + FN), and 0 for a kind that occurs neither
        among the labels nor among the judgements, as scikit-learn and published scripts have it;
        everything is NaN where no step has a label.
    """
    right_hit, right_missed, wrong_hit, wrong_missed = np.moveaxis(counts, -1, 0)
    nothing = counts.sum(-1) == 0
    scores = [
        np.where(nothing, np.nan, quotient(2 * hit, 2 * hit + right_missed + wrong_missed))
        for hit in (right_hit, wrong_hit)
    ]
    return {"f1_right": scores[0], "f1_wrong": scores[1], "macro_f1": (scores[0] + scores[1]) / 2}


def quotient(above: np.ndarray, below: np.ndarray, otherwise: float = 0.0) -> np.ndarray:
    """A quotient, and something else where it would divide by 0."""
    shape = np.broadcast_shapes(np.shape(above), np.shape(below))
    return np.divide(above, below, out=np.full(shape, otherwise), where=np.not_equal(below, 0))


def mean_of(rows: Sequence[Metrics]) -> Metrics:
    """The mean of each metric over the rows that have it; NaN where none has."""
    means = {}
    for name in rows[0]:
        values = np.stack([row[name] for row in rows])
        there = ~np.isnan(values)
        means[name] = quotient(np.where(there, values, 0).sum(0), there.sum(0), np.nan)
    return means
