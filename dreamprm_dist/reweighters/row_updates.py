"""Updates of the table's rows from a sparse hypergradient, as torch optimizers.

Decay is decoupled, towards 0 or, with `decay_to_initialization`, towards where every row began.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from dreamprm_dist import distributed
from dreamprm_dist.training.config import UpperConfig


class DenseAdamW(AdamW):
    """AdamW over all rows at every step, as the reference implementation.

    A row that was not drawn keeps moving by its momentum and decays. Cost proportional to the
    table.
    """

    def __init__(self, rows: list[Tensor], *, decay_target: float, **defaults):
        super().__init__(rows, **defaults)
        self._decay_target = decay_target

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = parameter.grad.to_dense()
        super().step(closure)
        if self._decay_target:
            # AdamW shrinks towards 0 by lr * decay; this adds what shrinking towards the target
            # leaves.
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(group["lr"] * group["weight_decay"] * self._decay_target)


class RowOptimizer(Optimizer):
    """Moves only the rows of the sparse gradient; cost proportional to the batch."""

    def __init__(self, rows: list[Tensor], *, decay_target: float, **defaults):
        super().__init__(rows, defaults)
        self._decay_target = decay_target

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        assert closure is None
        for group in self.param_groups:
            decay = group["lr"] * group["weight_decay"]
            for parameter in group["params"]:
                gradient = parameter.grad.coalesce()
                rows, values = gradient.indices()[0], gradient.values()
                update = self._update(parameter, rows, values, group)
                old = parameter[rows]
                parameter[rows] = old - decay * (old - self._decay_target) - group["lr"] * update

    def _update(self, parameter: Tensor, rows: Tensor, values: Tensor, group: dict) -> Tensor:
        """What the learning rate multiplies, (rows,)."""
        raise NotImplementedError


class LazyAdamW(RowOptimizer):
    """AdamW in which a row's moments, step count and decay advance only when it is drawn."""

    def _update(self, parameter: Tensor, rows: Tensor, values: Tensor, group: dict) -> Tensor:
        state = self.state[parameter]
        if not state:
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter)
            state["steps"] = torch.zeros_like(parameter, dtype=torch.int32)
        beta1, beta2 = group["betas"]
        steps = state["steps"][rows] + 1
        exp_avg = state["exp_avg"][rows].lerp(values, 1 - beta1)
        exp_avg_sq = state["exp_avg_sq"][rows].lerp(values.square(), 1 - beta2)
        state["steps"][rows], state["exp_avg"][rows] = steps, exp_avg
        state["exp_avg_sq"][rows] = exp_avg_sq
        root = (exp_avg_sq / (1 - beta2**steps)).sqrt()
        return exp_avg / (1 - beta1**steps) / (root + group["eps"])


class NormalizedSGD(RowOptimizer):
    """The hypergradient over its mean magnitude in the global batch, times the learning rate.

    The size of an instance's hypergradient is what tells clean from noisy; AdamW would turn every
    visit into nearly the same step. Two scalars are all-reduced.
    """

    def _update(self, parameter: Tensor, rows: Tensor, values: Tensor, group: dict) -> Tensor:
        local = torch.stack([values.abs().sum(), values.new_tensor(len(values))])
        total, count = distributed.all_reduce_sum(local)
        # A hypergradient of 0 everywhere moves nothing.
        return values / (total / count).clamp_min(torch.finfo(values.dtype).tiny)


def _adamw(config: UpperConfig) -> dict:
    return {
        "lr": config.meta_lr,
        "betas": (config.meta_momentum, 0.999),
        "eps": 1e-8,
        "weight_decay": config.meta_weight_decay,
        "decay_target": _decay_target(config),
    }


def _decay_target(config: UpperConfig) -> float:
    return config.initialization if config.decay_to_initialization else 0.0


ROW_UPDATES: dict[str, Callable[[list[Tensor], UpperConfig], Optimizer]] = {
    "adamw": lambda rows, config: DenseAdamW(rows, **_adamw(config)),
    "adamw_lazy": lambda rows, config: LazyAdamW(rows, **_adamw(config)),
    "normalized_sgd": lambda rows, config: NormalizedSGD(
        rows,
        lr=config.meta_lr,
        weight_decay=config.meta_weight_decay,
        decay_target=_decay_target(config),
    ),
}
