"""Best-of-N: choose one of the candidate solutions of a question, count how often it is right.

How N samples and a verifier are judged follows Cobbe et al., arXiv:2110.14168 (first candidate,
verifier, oracle) and Wang et al., arXiv:2203.11171 (self-consistency).
"""

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np
import torch

from dreamprm_dist.errors import InputError
from dreamprm_dist.evaluation.results import QuestionOutcome
from dreamprm_dist.prm.aggregation import AGGREGATIONS, aggregate, pad_steps

NUM_SAMPLES = 10_000  # of the bootstrap
PERCENTILES = (2.5, 97.5)


@dataclass
class CandidateScores:
    """One candidate solution of a question, as judged.

    Attributes:
        question: index of the question; candidates of one question share it.
        question_id: the question's id in its file, "" when it has none.
        candidate: index of the candidate within its question.
        subject: the question's subject, "" when it has none.
        step_scores: P(+) after each step; None where the candidate could not be scored.
        answer: the extracted answer, None when it could not be parsed.
        true_false: whether the final answer is right.
        images: the question's image paths; questions about the same images are not independent.
        step_labels: `+`, `-` or None (unlabelled) for each step, where steps have labels.
        error: why it could not be scored.
    """

    question: int
    question_id: str
    candidate: int
    subject: str
    step_scores: list[float] | None
    answer: str | None
    true_false: bool
    images: list[str] = field(default_factory=list)
    step_labels: list[str | None] | None = None
    error: str | None = None


def aggregate_candidates(
    scores: Sequence[Sequence[float] | None], aggregations: Iterable[str] = tuple(AGGREGATIONS)
) -> dict[str, list[float]]:
    """Every aggregation of each candidate of one question, in float64.

    Args:
        scores: for each of N candidates its step scores, None where it could not be scored; one at
            least was.

    Returns:
        Name of the aggregation -> N numbers; that of a candidate that could not be scored is -inf,
        so that any other is chosen before it.
    """
    scored = [steps for steps in scores if steps is not None]
    values = torch.tensor([s for steps in scored for s in steps], dtype=torch.float64)
    lengths = torch.tensor([len(steps) for steps in scored])
    rows = torch.arange(len(scored)).repeat_interleave(lengths)
    padded, mask = pad_steps(values, rows, len(scored))
    totals = {name: iter(aggregate(name, padded, mask).tolist()) for name in aggregations}
    return {
        name: [-math.inf if steps is None else next(values) for steps in scores]
        for name, values in totals.items()
    }


def select(scores: Sequence[float]) -> int:
    """The index of the highest score; ties go to the first.

    Raises:
        InputError: there is no score, or one is not a number.
    """
    if not scores:
        raise InputError("cannot select from no candidates; give at least one score")
    for index, score in enumerate(scores):
        if math.isnan(score):
            raise InputError(f"cannot select: the score of candidate {index} is not a number")
    return max(range(len(scores)), key=scores.__getitem__)


@dataclass
class Judged:
    """The choices among the candidates of each question, question by question.

    Attributes:
        questions: choices that need no PRM.
        correct: by aggregation, whether the candidate with the highest aggregate is right.
    """

    questions: list[QuestionOutcome]
    correct: dict[str, list[bool]]

    def accuracies(self) -> dict[str, float]:
        """Part of the questions with a right choice, by aggregation."""
        return {name: fmean(correct) for name, correct in self.correct.items()}


def judge(
    candidates: Iterable[CandidateScores], aggregations: Iterable[str] = tuple(AGGREGATIONS)
) -> Judged:
    """Every way to choose among the candidates of each question.

    `first`: the first candidate. `random`: the expected accuracy of a uniform choice.
    `self_consistency`: the most frequent answer, ties to the one that appears first; it is right
    when the first candidate that has it is. Unparsed candidates do not vote, and a question
    without any vote counts as wrong. `oracle`: any candidate is right. A PRM chooses the candidate
    with the highest aggregate, among those that it could score.

    Raises:
        InputError: there is no candidate, an aggregation is unknown, or a score is not a number.
    """
    groups = by_question(candidates)
    if not groups:
        raise InputError("there is nothing to judge: no candidate was scored")
    judged = Judged([], {name: [] for name in aggregations})
    for group in groups:
        right = [candidate.true_false for candidate in group]
        judged.questions.append(
            QuestionOutcome(
                id=group[0].question_id,
                images=group[0].images,
                subject=group[0].subject,
                first=right[0],
                random=fmean(right),
                self_consistency=majority_is_right([c.answer for c in group], right),
                oracle=any(right),
            )
        )
        totals = aggregate_candidates([c.step_scores for c in group], judged.correct)
        for name, scores in totals.items():
            judged.correct[name].append(right[select(scores)])
    return judged


def by_question(candidates: Iterable[CandidateScores]) -> list[list[CandidateScores]]:
    """The candidates of each question, in the order of the questions' first candidates."""
    groups: dict[int, list[CandidateScores]] = {}
    for candidate in candidates:
        groups.setdefault(candidate.question, []).append(candidate)
    return list(groups.values())


def majority_is_right(answers: Sequence[str | None], right: Sequence[bool]) -> bool:
    """Whether the first candidate with the most frequent answer is right; see `judge`."""
    votes = Counter(answer for answer in answers if answer is not None)
    # A Counter keeps the order of first appearance, and max() keeps the first of equals.
    return bool(votes) and right[answers.index(max(votes, key=votes.__getitem__))]


def clustered_bootstrap(
    differences: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable],
    num_samples: int = NUM_SAMPLES,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Mean of paired differences and its percentile 95 % interval, resampling whole clusters.

    Questions about one image are not independent; drawing clusters instead of questions keeps the
    interval honest (Field and Welsh, JRSS B 69, 2007).

    Args:
        differences: shape (Q,), for each question the difference between two methods.
        clusters: for each question its cluster, such as its image.

    Returns:
        (mean, low, high) in the unit of the differences.

    Raises:
        InputError: the two differ in length or are empty.
    """
    values = np.asarray(differences, dtype=np.float64)
    low, high = bootstrap_intervals(values[:, None], clusters, num_samples, seed)[0]
    return float(values.mean()), float(low), float(high)


def bootstrap_intervals(
    values: np.ndarray, clusters: Sequence[Hashable], num_samples: int = NUM_SAMPLES, seed: int = 0
) -> np.ndarray:
    """Percentile 95 % intervals of M means over the same questions, resampling whole clusters.

    All columns are resampled with the same draws: intervals of methods and of their differences
    belong together.

    Args:
        values: shape (Q, M), of each question and method.
        clusters: for each question its cluster.

    Returns:
        shape (M, 2), low and high.

    Raises:
        InputError: the two differ in length or are empty.
    """
    if len(values) != len(clusters) or not len(values):
        raise InputError(
            f"{len(values)} differences and {len(clusters)} clusters; give each difference one"
        )
    sums = cluster_sums(values, clusters)
    sizes = cluster_sums(np.ones(len(values)), clusters)
    means = [
        draws @ sums / (draws @ sizes)[:, None]
        for draws in cluster_draws(len(sums), num_samples, seed)
    ]
    return np.percentile(np.concatenate(means), PERCENTILES, axis=0).T


def cluster_sums(values: np.ndarray, clusters: Sequence[Hashable]) -> np.ndarray:
    """Sums over each of K clusters: (Q, …) becomes (K, …), in the order of first appearance."""
    index = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    sums = np.zeros((len(index), *values.shape[1:]))
    np.add.at(sums, [index[cluster] for cluster in clusters], values)
    return sums


def cluster_draws(num_clusters: int, num_samples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield, some samples at a time, (samples, clusters): how often each cluster is drawn."""
    generator = np.random.default_rng(seed)
    for start in range(0, num_samples, 500):  # all at once would hold num_samples x clusters
        count = min(500, num_samples - start)
        yield generator.multinomial(num_clusters, np.full(num_clusters, 1 / num_clusters), count)
