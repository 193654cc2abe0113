"""One learned number per instance, partitioned over the ranks by sample ID."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dreamprm_dist import distributed
from dreamprm_dist.losses import Observation
from dreamprm_dist.prm.batch import Batch
from dreamprm_dist.reweighters.activations import activate, raw_weights_for
from dreamprm_dist.reweighters.base import Reweighter, ReweighterContext, weight_statistics
from dreamprm_dist.reweighters.row_updates import ROW_UPDATES

if TYPE_CHECKING:
    from dreamprm_dist.reweighters.config import MetaOptimizerConfig, ReweighterConfig


class InstanceTable(Reweighter):
    """The rows of this rank; at the start of `initialization`, or by the weights that are given.

    Attributes:
        raw_weights: (local rows,) float32 in the partition's order.
    """

    def __init__(
        self, config: ReweighterConfig, optimizer: MetaOptimizerConfig, context: ReweighterContext
    ):
        super().__init__(config, optimizer, context)
        if context.given_weights:
            weights = self.partition.read(context.given_weights)
            self.raw_weights = raw_weights_for(weights, config)
        else:
            self.raw_weights = torch.full(
                (self.partition.num_rows,), config.initialization, device=context.device
            )
        make = ROW_UPDATES[config.row_update]
        self._learn_by(make([self.raw_weights], optimizer, config.decay_target))
        self._pending: list[tuple[Tensor, Tensor]] = []

    def raw_weights_of(self, batch: Batch, features: Tensor) -> Tensor:
        return self.raw_weights[self.partition.rows(batch.sample_ids)]

    def activate(self, raw: Tensor) -> Tensor:
        return activate(raw, self.config)

    def add_hypergradient(
        self, batch: Batch, values: Observation, derivatives: Observation, size: int
    ) -> None:
        weighted = batch.weighted
        rows = self.partition.rows(batch.sample_ids[weighted])
        raw = self.raw_weights[rows].requires_grad_()
        cotangents = -derivatives.losses[weighted].to(raw.dtype) / size
        (gradient,) = torch.autograd.grad(self.activate(raw), raw, cotangents)
        self._pending.append((rows, gradient))

    def hypergradient(self) -> Tensor:
        """The hypergradient that the next step applies to this rank's rows, a sparse (local rows,).

        Coalesced: an instance drawn twice has the sum.
        """
        rows, values = (torch.cat(parts) for parts in zip(*self._pending, strict=True))
        return torch.sparse_coo_tensor(
            rows[None], values, self.raw_weights.shape, check_invariants=False
        ).coalesce()

    def forget(self) -> None:
        self._pending.clear()

    def step(self) -> Tensor:
        if not self._pending:
            return torch.tensor(torch.nan, device=self.device)
        gradient = self.hypergradient()
        self.forget()
        squared_norm = gradient.values().square().sum()
        total = distributed.all_reduce_sum(squared_norm)
        if not total.isfinite():
            return total * torch.nan
        factor = self._clipping_factor(total)
        self.raw_weights.grad = (gradient * factor).coalesce()
        self._optimizer.step()
        self._schedule.step()
        self.raw_weights.grad = None
        if self.config.activation_function == "Project":
            bounds = self.config.weight_min, self.config.weight_max
            if getattr(self._optimizer, "moves_every_row", True):
                self.raw_weights.clamp_(*bounds)
            else:
                rows = gradient.indices()[0]
                self.raw_weights[rows] = self.raw_weights[rows].clamp(*bounds)
        return squared_norm

    def state_dict(self) -> dict[str, Tensor]:
        """As of every reweighter, with what is one number per row cut into `shard-S.*`."""
        state = super().state_dict()
        by_row = {n: t for n, t in state.items() if t.shape == self.raw_weights.shape}
        return {name: t for name, t in state.items() if name not in by_row} | {
            # Copies, for safetensors writes no tensors that share their memory.
            f"shard-{shard}.{name}": rows.clone()
            for name, t in by_row.items()
            for shard, rows in zip(self.partition.shards, self.partition.by_shard(t), strict=True)
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        shards = self.partition.shards
        first = f"shard-{shards[0]}."
        names = [name.removeprefix(first) for name in state if name.startswith(first)]
        rows = {n: torch.cat([state[f"shard-{shard}.{n}"] for shard in shards]) for n in names}
        shared = {name: state[name] for name in state if not name.startswith("shard-")}
        super().load_state_dict(shared | rows)

    def statistics(self) -> dict[str, float]:
        return weight_statistics(self.activate(self.raw_weights))

    def local_raw_weights(self) -> Tensor:
        return self.raw_weights
