"""The comparison of several PRMs on the same questions: one table, with intervals.

Everything is paired: all methods answer the same questions, and intervals are bootstrapped over
clusters of questions (those about the same images). Nothing is chosen on the test questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from math import comb
from statistics import fmean

import numpy as np
import pandas as pd

from dreamprm_dist.evaluation.best_of_n import (
    CandidateScores,
    aggregate_candidates,
    bootstrap_intervals,
    by_question,
    judge,
    majority_is_right,
)
from dreamprm_dist.evaluation.results import (
    Difference,
    PrmOutcome,
    QuestionOutcome,
    Results,
    StepMetrics,
    TableRow,
)

BASICS = ("first", "random", "self_consistency", "oracle")
MOST_N = 8
CALIBRATION_BINS = 10
MOST_SUBSETS = 200


def compare(
    prms: Mapping[str, list[CandidateScores]], aggregations: Mapping[str, str], seed: int = 0
) -> Results:
    """Judge PRMs on the same questions.

    Args:
        prms: by its label, each PRM's scores of all candidates, in the same order for all.
        aggregations: by label, the aggregation that stands for the PRM; chosen elsewhere.
        seed: of the bootstrap.

    Returns:
        All but where PRMs and questions are from.
    """
    judged = {label: judge(candidates) for label, candidates in prms.items()}
    questions = next(iter(judged.values())).questions
    basics = {name: [getattr(question, name) for question in questions] for name in BASICS}
    chosen = {label: judged[label].correct[name] for label, name in aggregations.items()}
    columns: dict[tuple[str, str, str], Sequence[float]] = {
        (name, "", ""): basics[name] for name in BASICS[:-1]
    }
    for label, results in judged.items():
        for name, correct in results.correct.items():
            columns[f"{label}, {name}", label, name] = correct
    columns["oracle", "", ""] = basics["oracle"]
    values = np.array([*columns.values()], dtype=np.float64).T
    pairs = list(combinations(prms, 2))
    differences = [np.subtract(chosen[b], chosen[a], dtype=np.float64) for a, b in pairs]
    everything = np.column_stack([values, values - values[:, :1], *differences])
    # A question without an image is a cluster of its own.
    clusters = [tuple(question.images) or index for index, question in enumerate(questions)]
    intervals = bootstrap_intervals(everything, clusters, seed=seed).tolist()
    means = everything.mean(0).tolist()
    width = len(columns)
    candidates = next(iter(prms.values()))
    return Results(
        num_questions=len(questions),
        num_candidates=len(candidates),
        num_unparsed=sum(candidate.answer is None for candidate in candidates),
        table=[
            TableRow(
                method=method,
                prm=label,
                aggregation=aggregation,
                accuracy=means[i],
                interval_95=intervals[i],
                over_first=means[width + i],
                over_first_interval_95=intervals[width + i],
            )
            for i, (method, label, aggregation) in enumerate(columns)
        ],
        between=[
            Difference(prm=b, over=a, difference=means[i], interval_95=intervals[i])
            for i, (a, b) in enumerate(pairs, 2 * width)
        ],
        by_subject=_by_subject(questions, basics | chosen),
        by_n=_by_n(prms, aggregations),
        questions=questions,
        prms={
            label: PrmOutcome(
                aggregation=aggregations[label],
                correct=judged[label].correct,
                steps=step_metrics(candidates),
            )
            for label, candidates in prms.items()
        },
    )


def _by_subject(
    questions: Sequence[QuestionOutcome], outcomes: Mapping[str, Sequence[float]]
) -> dict[str, dict[str, float]]:
    rows: dict[str, list[int]] = {}
    for row, question in enumerate(questions):
        rows.setdefault(question.subject, []).append(row)
    return {
        subject: {"num_questions": len(rows[subject])}
        | {name: fmean(values[row] for row in rows[subject]) for name, values in outcomes.items()}
        for subject in sorted(rows.keys() - {""})
    }


def _by_n(
    prms: Mapping[str, list[CandidateScores]], aggregations: Mapping[str, str]
) -> dict[str, dict[str, float]]:
    """Expected accuracy with N of a question's candidates drawn at random, N = 1 … 8.

    A question with fewer candidates keeps all that it has.
    """
    groups = {label: by_question(candidates) for label, candidates in prms.items()}
    some = next(iter(groups.values()))
    most = min(MOST_N, max(map(len, some)))
    curves: dict[str, dict] = {}
    for n in range(1, most + 1):
        row = {
            "random": np.mean([np.mean([c.true_false for c in group]) for group in some]),
            "self_consistency": np.mean([expected_majority(group, n) for group in some]),
            "oracle": np.mean([expected_oracle([c.true_false for c in g], n) for g in some]),
        }
        for label, own in groups.items():
            name = aggregations[label]
            scores = [aggregate_candidates([c.step_scores for c in g], [name])[name] for g in own]
            row[label] = np.mean(
                [
                    expected_selection(s, [c.true_false for c in g], n)
                    for s, g in zip(scores, own, strict=True)
                ]
            )
        curves[str(n)] = {name: float(value) for name, value in row.items()}
    return curves


def expected_selection(scores: Sequence[float], right: Sequence[bool], n: int) -> float:
    """Probability that the highest score among n candidates drawn at random is a right one's.

    The candidate of rank r (from 0) is chosen when it is drawn and the r better ones are not; ties
    go to the earlier candidate, as in `select`.
    """
    total = len(scores)
    n = min(n, total)
    order = sorted(range(total), key=lambda i: -scores[i])
    chosen = (comb(total - 1 - rank, n - 1) for rank in range(total))
    return sum(p for p, i in zip(chosen, order, strict=True) if right[i]) / comb(total, n)


def expected_oracle(right: Sequence[bool], n: int) -> float:
    """Probability that at least one of n candidates drawn at random is right."""
    n = min(n, len(right))
    return 1 - comb(len(right) - sum(right), n) / comb(len(right), n)


def expected_majority(group: Sequence[CandidateScores], n: int) -> float:
    """Expected accuracy of self-consistency among n candidates drawn at random.

    Over all subsets, or 200 of them drawn with a fixed seed when there are more.
    """
    n = min(n, len(group))
    if comb(len(group), n) <= MOST_SUBSETS:
        subsets = list(combinations(range(len(group)), n))
    else:
        generator = np.random.default_rng(0)
        draws = (generator.choice(len(group), n, replace=False) for _ in range(MOST_SUBSETS))
        subsets = [tuple(sorted(draw.tolist())) for draw in draws]
    hits = (
        majority_is_right([group[i].answer for i in s], [group[i].true_false for i in s])
        for s in subsets
    )
    return sum(hits) / len(subsets)


def step_metrics(candidates: Sequence[CandidateScores]) -> StepMetrics | None:
    """AUROC and calibration of step scores, over all labelled steps; None where there is none."""
    pairs = [
        (score, label == "+")
        for candidate in candidates
        for score, label in zip(
            candidate.step_scores or [], candidate.step_labels or [], strict=False
        )
        if label is not None
    ]
    return metrics_of_steps(pairs) if pairs else None


def metrics_of_steps(pairs: Sequence[tuple[float, bool]]) -> StepMetrics:
    """AUROC and calibration of the scores of labelled steps, at least one.

    Args:
        pairs: for each step its score and whether it is right.
    """
    frame = pd.DataFrame(pairs, columns=["score", "right"])
    positive = int(frame["right"].sum())
    negative = len(frame) - positive
    auroc = None
    if positive and negative:
        ranks = frame["score"].rank()[frame["right"]].sum()  # ties share their mean rank
        auroc = float((ranks - positive * (positive + 1) / 2) / (positive * negative))
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)[1:-1]
    by_bin = frame.groupby(np.digitize(frame["score"], edges))
    bins = by_bin.agg(count=("score", "size"), score=("score", "mean"), right=("right", "mean"))
    gaps = (bins["score"] - bins["right"]).abs()
    return StepMetrics(
        num_steps=len(frame),
        auroc=auroc,
        brier=float(((frame["score"] - frame["right"]) ** 2).mean()),
        calibration_error=float((gaps * bins["count"]).sum() / len(frame)),
        bins=bins.to_dict("records"),
    )
