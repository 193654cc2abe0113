"""Updates of the table's rows from a sparse hypergradient, as torch optimizers.

Decay is decoupled, towards 0 or, with `decay_to_initialization`, towards where every row began.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from dreamprm_dist import distributed

if TYPE_CHECKING:
    from dreamprm_dist.reweighters.config import MetaOptimizerConfig


class DenseAdamW(AdamW):
    """AdamW over all rows at every step, as the reference implementation.

    A row that was not drawn keeps moving by its momentum and decays. Cost proportional to the
    table.
    """

    def __init__(self, rows: list[Tensor], *, decay_target: float, **defaults):
        super().__init__(rows, **defaults)
        self._decay_target = decay_target

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closures
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = parameter.grad.to_dense()
        super().step()
        if self._decay_target:
            # AdamW shrinks towards 0 by lr * decay; this adds what shrinking towards the target
            # leaves.
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(group["lr"] * group["weight_decay"] * self._decay_target)


class NormalizedSGD(Optimizer):
    """The hypergradient over its mean magnitude in the global batch, times the learning rate.

    The size of an instance's hypergradient is what tells clean from noisy; AdamW would turn every
    visit into nearly the same step. Moves and decays only the rows of the sparse gradient, at a
    cost proportional to the batch. Two scalars are all-reduced.
    """

    moves_every_row = False  # so only rows of the gradient need projecting

    def __init__(self, rows: list[Tensor], *, decay_target: float, **defaults):
        super().__init__(rows, defaults)
        self._decay_target = decay_target

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closures
        for group in self.param_groups:
            decay = group["lr"] * group["weight_decay"]
            for parameter in group["params"]:
                gradient = parameter.grad.coalesce()
                rows, values = gradient.indices()[0], gradient.values()
                local = torch.stack([values.abs().sum(), values.new_tensor(len(values))])
                total, count = distributed.all_reduce_sum(local)
                # A hypergradient of 0 everywhere moves nothing.
                update = values / (total / count).clamp_min(torch.finfo(values.dtype).tiny)
                old = parameter[rows]
                parameter[rows] = old - decay * (old - self._decay_target) - group["lr"] * update


RowUpdate: TypeAlias = "Callable[[list[Tensor], MetaOptimizerConfig, float], Optimizer]"

# Each of (rows, config, decay target).
ROW_UPDATES: dict[str, RowUpdate] = {
    "adamw": lambda rows, config, target: DenseAdamW(
        rows,
        lr=config.meta_lr,
        betas=(config.meta_momentum, 0.999),
        weight_decay=config.meta_weight_decay,
        decay_target=target,
    ),
    "normalized_sgd": lambda rows, config, target: NormalizedSGD(
        rows, lr=config.meta_lr, weight_decay=config.meta_weight_decay, decay_target=target
    ),
}
