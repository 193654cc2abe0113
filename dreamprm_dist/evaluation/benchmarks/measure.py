"""PRMs measured on the same labelled solutions, with paired intervals.

All metrics are functions of counts, so that the bootstrap resamples sums of counts over clusters of
solutions (those about the same images or problem) and takes each metric anew of what was drawn. All
PRMs and thresholds see the same draws. That a threshold was chosen is no part of an interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from dreamprm_dist.errors import InputError
from dreamprm_dist.evaluation.benchmarks.base import Benchmark, LabelledSolution
from dreamprm_dist.evaluation.benchmarks.counts import (
    Outcomes,
    best_threshold,
    candidate_thresholds,
    step_f1,
    step_outcomes,
)
from dreamprm_dist.evaluation.benchmarks.results import (
    Chosen,
    Difference,
    GroupSize,
    Judged,
    PrmOutcome,
    Row,
    Value,
)
from dreamprm_dist.evaluation.best_of_n import (
    NUM_SAMPLES,
    PERCENTILES,
    cluster_draws,
    cluster_sums,
)
from dreamprm_dist.evaluation.compare import metrics_of_steps

Labels = Sequence[str | None]


def choose_threshold(labelled: Sequence[tuple[Labels, Sequence[float]]]) -> tuple[float, float]:
    """The threshold of highest macro-F1 over labelled steps, and that macro-F1.

    Args:
        labelled: for each solution the labels and the scores of its steps.

    Raises:
        InputError: not both a right and a wrong step are there.
    """
    kinds = {label for labels, _ in labelled for label in labels} - {None}
    if len(kinds) < 2:
        raise InputError("no threshold can be chosen: give solutions with right and wrong steps")
    thresholds = candidate_thresholds([score for _, scores in labelled for score in scores])
    steps = [(0, labels, scores) for labels, scores in labelled]
    counts = Outcomes(step_outcomes, steps, 1).sweep(thresholds)
    values = step_f1(counts[:, 0])["macro_f1"]
    return best_threshold(values, thresholds), float(values.max())


def group_sizes(solutions: Sequence[LabelledSolution]) -> dict[str, GroupSize]:
    """Sizes of the groups, in the order of their names."""
    sizes = {}
    for name in sorted({solution.group for solution in solutions}):
        members = [solution for solution in solutions if solution.group == name]
        labels = [label for solution in members for label in solution.labels]
        sizes[name] = GroupSize(
            num_solutions=len(members),
            num_right=labels.count("+"),
            num_wrong=labels.count("-"),
            num_unlabelled=labels.count(None),
        )
    return sizes


def measure_prms(
    benchmark: Benchmark,
    solutions: Sequence[LabelledSolution],
    scores: Mapping[str, Sequence[Sequence[float]]],
    thresholds: Mapping[str, tuple[float, Chosen | None]],
    oracle: bool = False,
    seed: int = 0,
) -> tuple[dict[str, PrmOutcome], list[Difference]]:
    """Each PRM's table and step metrics, and PRMs against each other.

    Args:
        solutions: S of them, of which at least one has a labelled step.
        scores: by the PRM's label, for each solution the scores of its steps.
        thresholds: by label, and how it was chosen where it was.
        oracle: also take each PRM at the threshold that is best on these solutions.
        seed: of the bootstrap.
    """
    groups = [*group_sizes(solutions)]
    places = [groups.index(solution.group) for solution in solutions]
    used: dict[tuple[str, bool], float] = {}
    counts: dict[tuple[str, bool], np.ndarray] = {}
    for label, of_prm in scores.items():
        steps = list(zip(places, (s.labels for s in solutions), of_prm, strict=True))
        outcomes = Outcomes(benchmark.outcomes, steps, len(groups))
        used[label, False] = thresholds[label][0]
        if oracle:
            used[label, True] = _oracle_threshold(benchmark, groups, outcomes, of_prm)
        for is_oracle in (False, True)[: 1 + oracle]:
            counts[label, is_oracle] = outcomes.counts(used[label, is_oracle])
    names = [name for name, _ in benchmark.measure(np.zeros((len(groups), 4)), groups)]
    values, samples = {}, {}
    clusters = [solution.cluster for solution in solutions]
    for which, counted in counts.items():
        values[which] = _values(benchmark, groups, counted.sum(0))
        samples[which] = _resampled(benchmark, groups, counted, clusters, seed)

    def judged(which: tuple[str, bool]) -> Judged:
        table = _rows(names, [*benchmark.metrics], values[which], samples[which])
        return Judged(threshold=used[which], rows=table)

    place = [*benchmark.metrics].index(benchmark.headline)
    headline = slice(place, place + 1)
    between = []
    for over, label in combinations(scores, 2):
        a, b = (over, False), (label, False)
        difference = values[b] - values[a], samples[b] - samples[a]
        rows = _rows(names, [benchmark.headline], *(part[..., headline] for part in difference))
        between.append(Difference(prm=label, over=over, rows=rows))
    prms = {
        label: PrmOutcome(
            judged=judged((label, False)),
            oracle=judged((label, True)) if oracle else None,
            chosen=thresholds[label][1],
            steps=metrics_of_steps(
                [
                    (score, step == "+")
                    for solution, of_steps in zip(solutions, of_prm, strict=True)
                    for step, score in zip(solution.labels, of_steps, strict=True)
                    if step is not None
                ]
            ),
        )
        for label, of_prm in scores.items()
    }
    return prms, between


def _oracle_threshold(
    benchmark: Benchmark,
    groups: Sequence[str],
    outcomes: Outcomes,
    scores: Sequence[Sequence[float]],
) -> float:
    """The threshold at which the metric that stands for a PRM is highest on the solutions."""
    thresholds = candidate_thresholds([score for steps in scores for score in steps])
    _, metrics = benchmark.measure(outcomes.sweep(thresholds), groups)[0]
    values = metrics[benchmark.headline]
    # Nothing to choose by: subsets of ProcessBench that lack erroneous or correct solutions.
    return 0.5 if np.isnan(values).all() else best_threshold(values, thresholds)


def _values(benchmark: Benchmark, groups: Sequence[str], counts: np.ndarray) -> np.ndarray:
    """Counts (..., G, 4) to metrics (..., rows, metrics)."""
    rows = benchmark.measure(counts, groups)
    return np.stack(
        [np.stack([metrics[n] for n in benchmark.metrics], axis=-1) for _, metrics in rows], axis=-2
    )


def _resampled(
    benchmark: Benchmark,
    groups: Sequence[str],
    counts: np.ndarray,
    clusters: Sequence,
    seed: int,
) -> np.ndarray:
    """Metrics of each bootstrap sample, (samples, rows, metrics); see `bootstrap_intervals`."""
    sums = cluster_sums(counts.reshape(len(counts), -1), clusters)
    drawn = [
        _values(benchmark, groups, (draws @ sums).reshape(len(draws), len(groups), 4))
        for draws in cluster_draws(len(sums), NUM_SAMPLES, seed)
    ]
    return np.concatenate(drawn)


def _rows(
    names: Sequence[str], metrics: Sequence[str], values: np.ndarray, samples: np.ndarray
) -> list[Row]:
    return [
        Row(
            name=name,
            metrics={
                metric: _value(float(values[i, j]), samples[:, i, j])
                for j, metric in enumerate(metrics)
            },
        )
        for i, name in enumerate(names)
    ]


def _value(value: float, samples: np.ndarray) -> Value:
    """A value and its interval, over the samples that have one."""
    if np.isnan(value):
        return Value(value=None, interval_95=None)
    interval = np.percentile(samples[~np.isnan(samples)], PERCENTILES).tolist()
    return Value(value=value, interval_95=interval)
