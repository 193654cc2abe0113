"""One learned number an instance, partitioned over the ranks by sample ID.

Row `sample_id` lies in shard `sample_id % num_shards`, whose owner is rank `shard % world_size`.
A rank only draws instances of its own shards, so look-up, hypergradient and update move no rows
between ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dreamprm_dist import distributed
from dreamprm_dist.config import UpperConfig
from dreamprm_dist.data.sampler import owned_shards
from dreamprm_dist.reweighters.activations import ACTIVATIONS
from dreamprm_dist.reweighters.row_updates import ROW_UPDATES
from dreamprm_dist.schedules import build_schedule

HISTOGRAM_BINS = 2048
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class InstanceTable:
    """The rows of this rank.

    Attributes:
        raw_weights: (local rows,) float32, shards in ascending order and rows of a shard in the
            order of their sample IDs.
    """

    def __init__(
        self,
        config: UpperConfig,
        rows_per_shard: list[int],
        num_steps: int,
        device: torch.device,
    ):
        self.config = config
        self.num_shards = len(rows_per_shard)
        self.rank, self.world_size = distributed.rank(), distributed.world_size()
        owned = owned_shards(self.num_shards, self.rank, self.world_size)
        counts = torch.tensor([rows_per_shard[shard] for shard in owned])
        self._rows_per_shard = rows_per_shard
        self._offsets = (counts.cumsum(0) - counts).to(device)
        self._local_rows_per_shard = counts.to(device)
        self.raw_weights = torch.full((int(counts.sum()),), config.initialization, device=device)
        self._activation = ACTIVATIONS[config.activation_function]
        self._optimizer = ROW_UPDATES[config.row_update]([self.raw_weights], config)
        self._schedule = build_schedule(
            config.meta_scheduler_type,
            self._optimizer,
            num_steps,
            config.meta_scheduler_step_size,
            config.meta_scheduler_gamma,
        )
        self._pending: list[tuple[Tensor, Tensor]] = []

    @property
    def lr(self) -> float:
        """Learning rate of the next upper step."""
        return self._optimizer.param_groups[0]["lr"]

    def rows(self, sample_ids: Tensor) -> Tensor:
        """Local rows of sample IDs (B,).

        Raises:
            ValueError: an ID is another rank's or beyond the data.
        """
        shards, rows = sample_ids % self.num_shards, sample_ids // self.num_shards
        foreign = shards % self.world_size != self.rank
        if foreign.any():
            stray = int(sample_ids[foreign][0])
            raise ValueError(
                f"sample_id {stray} belongs to rank {stray % self.num_shards % self.world_size}, "
                f"not to rank {self.rank}: each rank reads its own shards only"
            )
        local_shards = shards // self.world_size
        beyond = (sample_ids < 0) | (rows >= self._local_rows_per_shard[local_shards])
        if beyond.any():
            raise ValueError(f"sample_id {int(sample_ids[beyond][0])} is not in the training data")
        return self._offsets[local_shards] + rows

    def weights(self, sample_ids: Tensor) -> Tensor:
        """Detached weights (B,) of sample IDs (B,)."""
        return self._activation(self.raw_weights[self.rows(sample_ids)], self.config)

    def add_hypergradient(self, sample_ids: Tensor, cotangents: Tensor) -> None:
        """Add this rank's part of the hypergradient to what the next step applies.

        Args:
            sample_ids: (B,).
            cotangents: (B,) derivative of the upper objective by each weight,
                -(1/G) <grad l_i, v>. The chain through the activation is taken here.
        """
        rows = self.rows(sample_ids)
        raw = self.raw_weights[rows].requires_grad_()
        weights = self._activation(raw, self.config)
        (gradient,) = torch.autograd.grad(weights, raw, cotangents.to(raw.dtype))
        self._pending.append((rows, gradient))

    def hypergradient(self) -> Tensor:
        """What the next step applies to this rank's raw weights: a sparse tensor (local rows,).

        Coalesced: an instance drawn twice has the sum.
        """
        rows, values = (torch.cat(parts) for parts in zip(*self._pending, strict=True))
        return torch.sparse_coo_tensor(
            rows[None], values, self.raw_weights.shape, check_invariants=False
        ).coalesce()

    def step(self) -> Tensor:
        """Apply the hypergradient, then forget it.

        Returns:
            its squared norm over this rank's rows, a scalar.
        """
        gradient = self.hypergradient()
        self._pending.clear()
        self.raw_weights.grad = gradient
        self._optimizer.step()
        self._schedule.step()
        self.raw_weights.grad = None
        if self.config.activation_function == "Project":
            self.raw_weights.clamp_(self.config.weight_min, self.config.weight_max)
        return gradient.values().square().sum()

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's rows, their optimizer's state and where the schedule is."""
        optimizer = self._optimizer.state_dict()["state"].get(0, {})
        return {
            "raw_weights": self.raw_weights,
            "schedule_steps": torch.tensor(self._schedule.last_epoch),
            "lr": torch.tensor(self.lr, dtype=torch.float64),
            **{f"optimizer.{name}": value for name, value in optimizer.items()},
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put back what `state_dict` returned on this rank."""
        self.raw_weights.copy_(state["raw_weights"])
        groups = self._optimizer.state_dict()["param_groups"]
        groups[0]["lr"] = float(state["lr"])
        rows = {
            name.removeprefix("optimizer."): value
            for name, value in state.items()
            if name.startswith("optimizer.")
        }
        self._optimizer.load_state_dict({"state": {0: rows}, "param_groups": groups})
        self._schedule.last_epoch = int(state["schedule_steps"])

    def statistics(self) -> dict[str, float]:
        """Mean, extremes and quantiles of all weights, from a histogram summed over the ranks.

        Quantiles are exact to 1/2048 of the range.
        """
        weights = self._activation(self.raw_weights, self.config)
        extremes = torch.stack([-weights.min(), weights.max()])
        low, high = distributed.all_reduce_max(extremes).tolist()
        low = -low
        # histc takes equal bounds for "find them yourself", which would differ between ranks.
        bounds = (low, high) if high > low else (low, low + 1)
        counts = torch.histc(weights, HISTOGRAM_BINS, *bounds)
        packed = torch.cat([counts.double(), weights.double().sum()[None]])
        packed = distributed.all_reduce_sum(packed)
        total = sum(self._rows_per_shard)
        result = {"mean": float(packed[-1]) / total, "min": low, "max": high}
        cumulative = packed[:-1].cumsum(0)
        for q in QUANTILES:
            edge = int((cumulative < q * total).sum()) + 1
            result[f"q{round(q * 100):02d}"] = low + (high - low) * edge / HISTOGRAM_BINS
        return result

    def gather(self) -> tuple[Tensor, Tensor] | None:
        """Raw weights and weights of all instances in the order of sample IDs, on rank 0 only."""
        parts = distributed.gather_rows(self.raw_weights)
        if parts is None:
            return None
        raw = torch.empty(sum(self._rows_per_shard), device=self.raw_weights.device)
        for rank, part in enumerate(parts):
            shards = owned_shards(self.num_shards, rank, self.world_size)
            counts = [self._rows_per_shard[shard] for shard in shards]
            for shard, rows in zip(shards, part.split(counts), strict=True):
                raw[shard :: self.num_shards] = rows
        return raw.cpu(), self._activation(raw, self.config).cpu()
