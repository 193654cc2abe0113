"""Reweighters: their interface, and what they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim import Optimizer

from dreamprm_dist import distributed
from dreamprm_dist.losses import Observation
from dreamprm_dist.prm.batch import Batch
from dreamprm_dist.prm.model import StepOutput
from dreamprm_dist.reweighters.partition import RowPartition
from dreamprm_dist.reweighters.schedules import build_schedule, follow_schedule

if TYPE_CHECKING:
    from dreamprm_dist.reweighters.config import MetaOptimizerConfig, ReweighterConfig

HISTOGRAM_BINS = 2048
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True, kw_only=True)
class ReweighterContext:
    """The run that a reweighter is part of.

    Attributes:
        rows_per_shard: training instances of each shard.
        read_datasets: gives the `dataset` of each row of a shard.
        num_steps: upper steps of the run.
        device: where weights are held.
        hidden_size: width of the PRM's last hidden states.
        label_ids: token ids of `+` and `-`.
        seed: of the run.
        given_weights: weights of a shard's rows (rows,) in float32, finite and within what the
            activation gives, where the run was given any.
    """

    rows_per_shard: list[int]
    read_datasets: Callable[[int], list[str | None]]
    num_steps: int
    device: torch.device
    hidden_size: int
    label_ids: dict[str, int]
    seed: int
    given_weights: Callable[[int], Tensor] | None = None


class Reweighter(ABC):
    """Weights of instances and their upper step.

    Attributes:
        reads_prm: weights are computed from what the PRM says of an instance.
        learns: there is something for the upper level to learn.
        differentiate_weights: the PRM's parameters are differentiated through the weights too.
    """

    reads_prm = False
    learns = True
    differentiate_weights = False

    def __init__(
        self, config: ReweighterConfig, optimizer: MetaOptimizerConfig, context: ReweighterContext
    ):
        self.config, self.optimizer_config = config, optimizer
        self.partition = RowPartition(context.rows_per_shard, context.device)
        self.device = context.device
        self._num_steps = context.num_steps

    def features(self, output: StepOutput, losses: Tensor, batch: Batch) -> Tensor:
        """Features that the weights of a batch are computed from, see `Observation`."""
        return losses.new_zeros(0, 0)

    @abstractmethod
    def raw_weights_of(self, batch: Batch, features: Tensor) -> Tensor:
        """Raw weights (B,) of a batch, before the activation; any number where it has none."""

    @abstractmethod
    def activate(self, raw: Tensor) -> Tensor:
        """Raw weights to weights."""

    def weights(self, batch: Batch, features: Tensor) -> Tensor:
        """Weights (B,) that the lower level multiplies the instance losses by.

        1 for instances that have none of their own, see `Batch.weighted`.
        """
        weights = self.activate(self.raw_weights_of(batch, features))
        weights = weights if self.differentiate_weights else weights.detach()
        weighted = batch.weighted.to(weights.device, non_blocking=True)
        return weights.where(weighted, weights.new_ones(()))

    @abstractmethod
    def add_hypergradient(
        self, batch: Batch, values: Observation, derivatives: Observation, size: int
    ) -> None:
        """Add a micro-batch's part of the hypergradient to what the next step applies.

        -(1/G) d/d alpha of sum_i d(w_i l_i) along v.

        Args:
            values, derivatives: from the estimator.
            size: the global batch size G.
        """

    @abstractmethod
    def forget(self) -> None:
        """Drop what `add_hypergradient` has added."""

    @abstractmethod
    def step(self) -> Tensor:
        """Apply the hypergradient, then forget it.

        One with a NaN or infinity is only forgotten, and where none was added nothing is done.

        Returns:
            its squared norm before clipping, this rank's share of it: the sum over the ranks is
            the global one. A scalar; NaN on every rank when it was not applied.
        """

    def local_raw_weights(self) -> Tensor:
        """Raw weights of this rank's rows, in the partition's order; not where `reads_prm`."""
        raise NotImplementedError

    @torch.no_grad()
    def gather(self, raw: Tensor) -> tuple[Tensor, Tensor] | None:
        """From the raw weights of this rank's rows (local rows,), raw weights and weights of all.

        Returns:
            Both in the order of sample IDs, on rank 0 only.
        """
        raw_weights, weights = self.partition.gather(raw), self.partition.gather(self.activate(raw))
        return None if raw_weights is None or weights is None else (raw_weights, weights)

    @property
    def lr(self) -> float:
        """Learning rate of the next upper step."""
        return self._optimizer.param_groups[0]["lr"]

    def state_dict(self) -> dict[str, Tensor]:
        """All that a step changes: parameters, optimizer and schedule.

        What is named `shard-S.*` belongs to that shard; everything else is equal on all ranks.
        """
        (group,) = self._optimizer.param_groups
        state = {
            "schedule_steps": torch.tensor(self._schedule.last_epoch),
            "lr": torch.tensor(self.lr, dtype=torch.float64),
        }
        for i, parameter in enumerate(group["params"]):
            state[f"{i}.parameter"] = parameter.detach()
            state |= {f"{i}.{name}": t for name, t in self._optimizer.state[parameter].items()}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state_dict` returned on all ranks, however many they were."""
        (group,) = self._optimizer.param_groups
        for i, parameter in enumerate(group["params"]):
            mine = {
                key.removeprefix(f"{i}."): t for key, t in state.items() if key.startswith(f"{i}.")
            }
            parameter.copy_(mine.pop("parameter"))
            if mine:
                self._optimizer.state[parameter] = {
                    # torch's AdamW counts its steps on the CPU, wherever the parameter lies.
                    name: t.clone() if name == "step" else t.to(self.device, copy=True)
                    for name, t in mine.items()
                }
        group["lr"] = float(state["lr"])
        self._schedule.last_epoch = int(state["schedule_steps"])
        follow_schedule(self._schedule)

    @abstractmethod
    def statistics(self) -> dict[str, float]:
        """Mean, extremes and quantiles of the weights; the same on every rank."""

    def _learn_by(self, optimizer: Optimizer) -> None:
        """Set the optimizer, with its schedule over the run's upper steps."""
        config = self.optimizer_config
        self._optimizer = optimizer
        self._schedule = build_schedule(
            config.meta_scheduler_type,
            optimizer,
            num_steps=self._num_steps,
            step_size=config.meta_scheduler_step_size,
            gamma=config.meta_scheduler_gamma,
        )

    def _clipping_factor(self, squared_norm: Tensor) -> Tensor:
        """The factor of clipping for a hypergradient of this global squared norm."""
        largest = self.optimizer_config.meta_gradient_clipping
        if not largest:
            return torch.ones_like(squared_norm)
        return (largest / squared_norm.sqrt()).clamp(max=1)


def weight_statistics(weights: Tensor) -> dict[str, float]:
    """Mean, extremes and quantiles of every rank's finite weights (n,); {} if there are none.

    Quantiles come from a histogram summed over the ranks and are exact to 1/2048 of the range.
    """
    weights = weights[weights.isfinite()]
    extremes = weights.new_full((2,), -torch.inf)
    if len(weights):
        extremes = torch.stack([-weights.min(), weights.max()])
    low, high = distributed.all_reduce_max(extremes).tolist()
    low = -low
    if low > high:
        return {}
    # histc takes equal bounds for "find them yourself", which would differ between ranks.
    bounds = (low, high) if high > low else (low, low + 1)
    counts = torch.histc(weights, HISTOGRAM_BINS, *bounds)
    packed = torch.cat([counts.double(), weights.double().sum()[None]])
    packed = distributed.all_reduce_sum(packed)
    total = float(packed[:-1].sum())
    result = {"mean": float(packed[-1]) / total, "min": low, "max": high}
    cumulative = packed[:-1].cumsum(0)
    for q in QUANTILES:
        edge = int((cumulative < q * total).sum()) + 1
        result[f"q{round(q * 100):02d}"] = low + (high - low) * edge / HISTOGRAM_BINS
    return result
