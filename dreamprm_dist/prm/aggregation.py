"""Aggregations: the step scores of a solution become one score.

The same functions serve the meta loss and Best-of-N, so the loss imitates how the PRM is used. A
new aggregation is one function and one line in `AGGREGATIONS`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dreamprm_dist.errors import InputError


# Padding is replaced before any arithmetic, never multiplied by zero after it: a log(0) or a NaN
# in the padding would still poison the gradient.
def _mean(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.where(mask, 0).sum(1) / mask.sum(1)


def _min(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.where(mask, torch.inf).amin(1)


def _max(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.where(mask, -torch.inf).amax(1)


def _log_mean(scores: Tensor, mask: Tensor) -> Tensor:
    """The geometric mean; a score of zero counts as the smallest normal number."""
    smallest = torch.finfo(scores.dtype).tiny
    return _mean(scores.where(mask, 1).clamp_min(smallest).log(), mask).exp()


def _product(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.where(mask, 1).prod(1)


def _last(scores: Tensor, mask: Tensor) -> Tensor:
    steps = torch.arange(scores.shape[1], device=scores.device)
    last = steps.where(mask, -1).argmax(1, keepdim=True)
    return scores.gather(1, last).squeeze(1)


AGGREGATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": _mean,
    "min": _min,
    "max": _max,
    "log_mean": _log_mean,
    "product": _product,
    "last": _last,
}


def aggregate(name: str, scores: Tensor, mask: Tensor) -> Tensor:
    """One score for each solution.

    Args:
        name: a key of `AGGREGATIONS`.
        scores: step scores, shape (B, S), each in [0, 1]; what stands in the padding is ignored.
        mask: bool, shape (B, S), true where there is a step.

    Returns:
        Shape (B,), differentiable in `scores`; nothing reaches the padding.

    Raises:
        InputError: the name is unknown, or a row has no step.
    """
    if name not in AGGREGATIONS:
        raise InputError(f"unknown aggregation {name!r}; choose from {', '.join(AGGREGATIONS)}")
    empty = (~mask.any(1)).nonzero().flatten().tolist()
    if empty:
        raise InputError(
            f"cannot aggregate row(s) {empty}: they have no step; leave out solutions without steps"
        )
    return AGGREGATIONS[name](scores, mask)


def pad_steps(values: Tensor, step_rows: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Lay a flat list of step values out as one row per solution, padded with zeros.

    Args:
        values: shape (n,); the steps of one row come in order.
        step_rows: int, shape (n,): the row that each step belongs to, in [0, num_rows).
        num_rows: number of rows B.

    Returns:
        The values, shape (B, S) with S the most steps of a row, differentiable in `values`, and
        the bool mask (B, S) of the places that hold a step.
    """
    counts = torch.bincount(step_rows, minlength=num_rows)
    width = int(counts.max()) if len(step_rows) else 0
    mask = torch.arange(width, device=values.device) < counts[:, None]
    in_row_order = values[step_rows.argsort(stable=True)]
    return values.new_zeros(mask.shape).masked_scatter(mask, in_row_order), mask
