"""Updates of the rows that received a hypergradient, as torch optimizers over a sparse gradient."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from dreamprm_dist import distributed
from dreamprm_dist.config import UpperConfig


class DenseAdamW(AdamW):
    """AdamW over all rows at every step, as the reference implementation.

    A row that was not drawn keeps moving by its momentum and decays towards 0. Cost proportional to
    the table.
    """

    def step(self, closure: Callable | None = None) -> None:
        for parameter in (p for group in self.param_groups for p in group["params"]):
            parameter.grad = parameter.grad.to_dense()
        super().step(closure)


class NormalizedSGD(Optimizer):
    """The hypergradient over its mean magnitude in the global batch, times the learning rate.

    The size of an instance's hypergradient is what tells clean from noisy; AdamW would turn every
    visit into nearly the same step. Decay is decoupled and, like the step, only on drawn rows; cost
    proportional to the batch. Two scalars are all-reduced.
    """

    def __init__(self, parameters: list[Tensor], lr: float, weight_decay: float):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad.coalesce()
                rows, values = gradient.indices()[0], gradient.values()
                local = torch.stack([values.abs().sum(), values.new_tensor(len(values))])
                total, count = distributed.all_reduce_sum(local)
                mean = total / count
                if mean > 0:
                    decayed = parameter[rows] * (1 - group["lr"] * group["weight_decay"])
                    parameter[rows] = decayed - group["lr"] * values / mean


ROW_UPDATES: dict[str, Callable[[list[Tensor], UpperConfig], Optimizer]] = {
    "adamw": lambda rows, config: DenseAdamW(
        rows,
        lr=config.meta_lr,
        betas=(config.meta_momentum, 0.999),
        weight_decay=config.meta_weight_decay,
    ),
    "normalized_sgd": lambda rows, config: NormalizedSGD(
        rows, lr=config.meta_lr, weight_decay=config.meta_weight_decay
    ),
}
