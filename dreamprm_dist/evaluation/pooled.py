"""Evaluations of several seeds pooled, with intervals over seeds and images."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

import numpy as np

from dreamprm_dist.evaluation.best_of_n import NUM_SAMPLES, PERCENTILES, cluster_sums
from dreamprm_dist.evaluation.compare import BASICS
from dreamprm_dist.evaluation.results import Results

BLOCK = 500  # resamples at a time


def pooled(runs: Sequence[Results], pairs: Iterable[tuple[str, str]], seed: int = 0) -> dict:
    """Accuracies over the questions of all runs, and paired differences, with 95 % intervals.

    Args:
        runs: the evaluation of each seed, of PRMs with the same labels.
        pairs: labels of PRMs (a, b), for the accuracy of a minus that of b.
        seed: of the bootstrap, see `nested_bootstrap`.

    Returns:
        `num_questions`; `accuracy` by method or label; `intervals`, [low, high] by the same;
        `differences` with `mean`, `low` and `high` by `a_minus_b`.
    """
    pairs = list(pairs)
    blocks = []
    for run in runs:
        columns = {name: [getattr(q, name) for q in run.questions] for name in BASICS}
        columns |= {label: prm.correct[prm.aggregation] for label, prm in run.prms.items()}
        values = np.array([*columns.values()], dtype=np.float64).T
        place = {name: i for i, name in enumerate(columns)}
        differences = [values[:, place[a]] - values[:, place[b]] for a, b in pairs]
        # Questions about one image are not independent.
        clusters = [tuple(question.images) for question in run.questions]
        blocks.append((np.column_stack([values, *differences]), clusters))
    means = np.concatenate([values for values, _ in blocks]).mean(0).tolist()
    intervals = nested_bootstrap(blocks, seed=seed).tolist()
    width = len(place)
    return {
        "num_questions": sum(len(values) for values, _ in blocks),
        "accuracy": dict(zip(place, means, strict=False)),
        "intervals": dict(zip(place, intervals, strict=False)),
        "differences": {
            f"{a}_minus_{b}": {"mean": means[i], "low": intervals[i][0], "high": intervals[i][1]}
            for i, (a, b) in enumerate(pairs, start=width)
        },
    }


def nested_bootstrap(
    runs: Sequence[tuple[np.ndarray, Sequence[Hashable]]],
    num_samples: int = NUM_SAMPLES,
    seed: int = 0,
) -> np.ndarray:
    """Percentile 95 % intervals of M means, resampling runs and within each drawn run its clusters.

    What training with another seed would have changed is in the interval as well as what other
    questions would have (the two-stage bootstrap of Davison and Hinkley, "Bootstrap Methods and
    their Application", section 3.8). With a single run the clusters alone are resampled. Of few
    runs it shows a little less than their variance: (S - 1) / S of it.

    Args:
        runs: for each run the values (questions, M), and the cluster of each question.

    Returns:
        shape (M, 2), low and high.
    """
    totals = [
        cluster_sums(np.column_stack([values, np.ones(len(values))]), clusters)
        for values, clusters in runs
    ]
    generator = np.random.default_rng(seed)
    means = []
    for start in range(0, num_samples, BLOCK):
        count = min(BLOCK, num_samples - start)
        drawn = generator.integers(len(runs), size=(count, len(runs)))
        resampled = np.zeros((count, totals[0].shape[1]))
        for turn in drawn.T:
            for run, sums in enumerate(totals):
                rows = np.flatnonzero(turn == run)
                even = np.full(len(sums), 1 / len(sums))
                resampled[rows] += generator.multinomial(len(sums), even, len(rows)) @ sums
        means.append(resampled[:, :-1] / resampled[:, -1:])
    return np.percentile(np.concatenate(means), PERCENTILES, axis=0).T
