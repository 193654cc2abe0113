"""The two losses of the bi-level problem, from logits at the step positions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dreamprm_dist.flags import FlagGroup, flag
from dreamprm_dist.prm.aggregation import AGGREGATIONS, aggregate, pad_steps
from dreamprm_dist.prm.chat import IGNORE_INDEX

ScoreOver = Literal["vocabulary", "pair"]


class Observation(NamedTuple):
    """The upper level's view of a micro-batch of B instances.

    Attributes:
        losses: (B,) instance losses.
        features: what the reweighter reads, (n, F) per labelled step or (B, F) per instance; (0, 0)
            for a reweighter that reads nothing.
    """

    losses: Tensor
    features: Tensor


def instance_losses(logits: Tensor, targets: Tensor, step_rows: Tensor, num_rows: int) -> Tensor:
    """Lower-level loss of each instance: mean cross-entropy over its labelled steps.

    Args:
        logits: (n, vocabulary), any floating dtype.
        targets: (n,) token ids, `IGNORE_INDEX` where a step is unlabelled.
        step_rows: (n,) the instance each step belongs to.
        num_rows: number of instances B.

    Returns:
        (B,) in float32 or wider; 0 for an instance without a labelled step.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    step_losses = F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORE_INDEX)
    labelled = (targets != IGNORE_INDEX).to(step_losses.dtype)
    zeros = torch.zeros(num_rows, dtype=step_losses.dtype, device=logits.device)
    totals = zeros.index_add(0, step_rows, step_losses)
    counts = zeros.index_add(0, step_rows, labelled)
    return totals / counts.clamp(min=1)


def step_scores(
    logits: Tensor,
    label_ids: Mapping[str, int],
    label: Literal["+", "-"] = "+",
    score_over: ScoreOver = "vocabulary",
) -> Tensor:
    """Probability of a label at each step: logits (n, vocabulary) -> (n,).

    Args:
        label_ids: token ids of `+` and `-`.
        score_over: what the softmax runs over, the whole vocabulary, as in the reference
            implementation, or `+` and `-` alone, as in VisualPRM.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if score_over == "pair":
        labels = ["+", "-"]
        pair = logits[:, [label_ids[name] for name in labels]]
        return pair.log_softmax(-1)[:, labels.index(label)].exp()
    return logits.log_softmax(-1)[:, label_ids[label]].exp()


@dataclass
class MetaLossConfig(FlagGroup):
    """The meta loss, which the upper level minimises."""

    _argument_group_name: ClassVar[str] = "meta loss"

    aggregation_function: str = flag(
        "mean", "How step scores become a solution's score.", choices=AGGREGATIONS
    )
    loss_target: Literal["+", "both"] = flag(
        "both", "Meta loss: of P(+) against the answer, or of P(the right sign) against 1."
    )
    meta_error: Literal["squared", "absolute"] = flag(
        "squared", "Error of the meta loss; with absolute and loss_target + random answers cancel."
    )
    score_over: ScoreOver = flag(
        "vocabulary", "Step scores of the meta loss: softmax over all words, or over + and -."
    )


def meta_losses(
    logits: Tensor,
    step_rows: Tensor,
    true_false: Tensor,
    label_ids: Mapping[str, int],
    config: MetaLossConfig,
) -> Tensor:
    """Upper-level loss of each solution: how wrong its aggregated score is about its answer.

    `+`: error of (aggregate of P(+) - y) with y = 1 for a right answer, else 0.
    `both`: error of (aggregate of P(the right sign) - 1), the right sign being `+` for a right
    answer.

    Under the square, answers at random pull every score to their mean. Where the losses of the two
    answers add up to a constant, a wrong one cancels a right one: the condition of "Robust Loss
    Functions under Label Noise for Deep Neural Networks" (arXiv 1712.09482). That holds for the
    absolute error of `+`, and of `both` over the pair with a linear aggregation (mean, last).

    Args:
        logits: (n, vocabulary) at every step of the B solutions.
        step_rows: (n,) the solution each step belongs to.
        true_false: (B,) 1 where the final answer is right, else 0.
        label_ids: token ids of `+` and `-`.

    Returns:
        (B,).
    """
    plus = step_scores(logits, label_ids, "+", config.score_over)
    if config.loss_target == "+":
        scores, goal = plus, true_false
    else:
        minus = step_scores(logits, label_ids, "-", config.score_over)
        scores = torch.where(true_false[step_rows] > 0.5, plus, minus)
        goal = torch.ones_like(true_false)
    padded, mask = pad_steps(scores, step_rows, len(true_false))
    difference = aggregate(config.aggregation_function, padded, mask) - goal
    return difference.abs() if config.meta_error == "absolute" else difference.square()
