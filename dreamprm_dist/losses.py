"""The two losses of the bi-level problem, from logits at the step positions."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dreamprm_dist.aggregation import aggregate, pad_steps
from dreamprm_dist.prm.chat import IGNORE_INDEX


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


def step_scores(logits: Tensor, label_token_id: int) -> Tensor:
    """Probability of a label at each step, over the whole vocabulary: (n, vocabulary) -> (n,)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.log_softmax(-1)[:, label_token_id].exp()


def meta_losses(
    logits: Tensor,
    step_rows: Tensor,
    true_false: Tensor,
    label_ids: dict[str, int],
    aggregation: str,
    loss_target: Literal["+", "both"],
) -> Tensor:
    """Upper-level loss of each solution: how wrong its aggregated score is about its answer.

    `+`: (aggregate of P(+) - y)^2 with y = 1 for a right answer, else 0.
    `both`: (aggregate of P(the right sign) - 1)^2, the right sign being `+` for a right answer.

    Args:
        logits: (n, vocabulary) at every step of the B solutions.
        step_rows: (n,) the solution each step belongs to.
        true_false: (B,) 1 where the final answer is right, else 0.

    Returns:
        (B,).
    """
    plus = step_scores(logits, label_ids["+"])
    if loss_target == "+":
        scores, goal = plus, true_false
    else:
        minus = step_scores(logits, label_ids["-"])
        scores = torch.where(true_false[step_rows] > 0.5, plus, minus)
        goal = torch.ones_like(true_false)
    padded, mask = pad_steps(scores, step_rows, len(true_false))
    return (aggregate(aggregation, padded, mask) - goal).square()
