"""The two losses of the bi-level problem, from logits at the step positions."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dreamprm_dist.errors import InputError
from dreamprm_dist.flags import FlagGroup, Fraction, Positive, flag
from dreamprm_dist.prm.aggregation import AGGREGATIONS, aggregate, pad_steps
from dreamprm_dist.prm.batch import Batch
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


@dataclass
class LowerLossConfig(FlagGroup):
    """The lower loss: what a step is trained on."""

    _argument_group_name: ClassVar[str] = "lower loss"

    label: Literal["hard", "soft"] = flag(
        "hard", "A step's label: + or -, or soft: the part of its roll-outs that were right."
    )
    label_threshold: Fraction | None = flag(
        None, "hard: + above this part of right roll-outs (default: the labels of the data)."
    )
    negative_weight: Positive = flag(1.0, "How often a step labelled - counts; soft: its - part.")
    step_loss: Literal["cross_entropy", "beta_binomial"] = flag(
        "cross_entropy",
        "Loss of a step: of its label, or beta_binomial: of the counts of its roll-outs.",
    )
    concentration: Positive = flag(
        8.0, "beta_binomial: c of Beta(P(+) c, P(-) c); the larger, the more each roll-out counts."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label == "soft" and self.step_loss == "beta_binomial":
            raise InputError(
                "beta_binomial reads the roll-outs themselves; leave out label soft, which makes "
                "a target of them"
            )
        if self.label_threshold is not None and self.reads_counts:
            raise InputError(
                f"label_threshold makes labels + and - of roll-outs, but {self.needs_counts} reads "
                "the roll-outs themselves; leave one of the two out"
            )

    @property
    def reads_counts(self) -> bool:
        """Whether the loss is of roll-outs, and not of labels."""
        return self.step_loss == "beta_binomial" or self.label == "soft"

    @property
    def needs_counts(self) -> str | None:
        """The flag for which steps must have roll-outs, if any."""
        if self.step_loss == "beta_binomial":
            return "step_loss beta_binomial"
        if self.label == "soft":
            return "label soft"
        return None if self.label_threshold is None else "label_threshold"


def instance_losses(
    logits: Tensor,
    batch: Batch,
    config: LowerLossConfig | None = None,
    label_ids: Mapping[str, int] | None = None,
) -> Tensor:
    """Lower-level loss of each instance, (1/n) sum_s w_s l_s over its n labelled steps.

    With p the part of a step's roll-outs that were right, and 1 or 0 for a step that knows none,
    by its label, l_s is

    - the cross-entropy of the label over the vocabulary, the default;
    - `soft`: -(p log P(+) + W (1 - p) log P(-)) over the vocabulary;
    - `beta_binomial`: see `beta_binomial_losses`.

    w_s is the negative weight W where the label is `-`, else 1; `soft` has it on its - part
    instead. The sum is divided by n and not by sum_s w_s, in which an instance whose labels are all
    `-` would not feel W. A step without a label has no loss, whatever roll-outs it knows.
    `label_threshold` is no matter of the loss: `RankBatches` labels the steps by it.

    Args:
        logits: (n, vocabulary) at the steps of a batch of B instances, any floating dtype.
        config: by default the plain cross-entropy.
        label_ids: token ids of `+` and `-`, which all but the plain cross-entropy need.

    Returns:
        (B,) in float32 or wider; 0 for an instance without a labelled step.
    """
    config = config or LowerLossConfig()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = batch.step_targets
    is_labelled = targets != IGNORE_INDEX
    if config.reads_counts:
        assert label_ids is not None
        correct, total = _counts_or_label(batch, label_ids)
        if config.step_loss == "beta_binomial":
            step_losses = beta_binomial_losses(
                logits, correct, total, label_ids, config.concentration
            )
        else:
            part = (correct / total).to(logits.dtype)
            log_scores = logits.log_softmax(-1)
            plus, minus = (log_scores[:, label_ids[label]] for label in "+-")
            step_losses = -(part * plus + config.negative_weight * (1 - part) * minus)
        step_losses = torch.where(is_labelled, step_losses, 0)
    else:
        step_losses = F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORE_INDEX)
    if config.negative_weight != 1 and config.label == "hard":
        assert label_ids is not None
        is_minus = targets == label_ids["-"]
        step_losses = torch.where(is_minus, config.negative_weight * step_losses, step_losses)
    labelled = is_labelled.to(step_losses.dtype)
    zeros = torch.zeros(len(batch), dtype=step_losses.dtype, device=logits.device)
    totals = zeros.index_add(0, batch.step_rows, step_losses)
    counts = zeros.index_add(0, batch.step_rows, labelled)
    return totals / counts.clamp(min=1)


def _counts_or_label(batch: Batch, label_ids: Mapping[str, int]) -> tuple[Tensor, Tensor]:
    """Roll-outs (n,) in float64, right ones and all: the label as one where a step knows none."""
    correct, total = batch.step_counts.double().unbind(1)
    is_plus = (batch.step_targets == label_ids["+"]).double()
    known = total > 0
    return torch.where(known, correct, is_plus), torch.where(known, total, 1)


def beta_binomial_losses(
    logits: Tensor,
    correct: Tensor,
    total: Tensor,
    label_ids: Mapping[str, int],
    concentration: float,
) -> Tensor:
    """Negative log-likelihood of each step's roll-outs, of which k of n were right.

    k ~ BetaBinomial(n, mu c, (1 - mu) c), mu = P(+) over `+` and `-` alone: each step has its own
    rate of success, from a Beta distribution about mu. It is the loss of "Process Rewards with
    Learned Reliability" (arXiv:2605.15529), which learns c for each step; here it is given. n
    roll-outs tell mu as much as n (c + 1) / (n + c) independent ones, fewer than c + 1 however many
    they are; so the loss is per step, and not divided by n. The binomial coefficient is in it: the
    loss is that of the count, and for n = 1 the cross-entropy over the pair.

    Args:
        logits: (n, vocabulary).
        correct, total: (n,) k and n >= 1, in float64.
        concentration: c.

    Returns:
        (n,) in the logits' dtype.
    """
    # In float64, for log-gammas of large arguments differ by little.
    pair = logits[:, [label_ids["+"], label_ids["-"]]].double().log_softmax(-1)
    log_alpha, log_beta = (pair + math.log(concentration)).unbind(1)
    likelihood = _log_rising(log_alpha, correct) + _log_rising(log_beta, total - correct)
    whole = torch.lgamma(total + concentration) - math.lgamma(concentration)
    ways = torch.lgamma(total + 1) - torch.lgamma(correct + 1) - torch.lgamma(total - correct + 1)
    return (whole - ways - likelihood).to(logits.dtype)


def _log_rising(log_a: Tensor, k: Tensor) -> Tensor:
    """log of a (a + 1) … (a + k - 1) for whole k, finite where a itself is 0 in floating point."""
    a = log_a.exp()
    return (k > 0) * log_a + torch.lgamma(a + k.clamp(min=1)) - torch.lgamma(a + 1)


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
