"""The partition of instances over ranks: a pure function of integers, and the way back.

Row `sample_id` lies in shard `sample_id % num_shards`, whose owner is rank `shard % world_size`.
A rank only draws instances of its own shards, so look-up and update move no rows between ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dreamprm_dist import distributed
from dreamprm_dist.data.joined import NO_ROW
from dreamprm_dist.data.sampler import owned_shards
from dreamprm_dist.errors import InputError


class RowPartition:
    """The rows of this rank: its shards in ascending order, a shard's rows by sample ID.

    Attributes:
        num_rows: rows of this rank.
        total: rows of all ranks.
    """

    def __init__(self, rows_per_shard: list[int], device: torch.device):
        self._rows_per_shard = rows_per_shard
        self.num_shards, self.total = len(rows_per_shard), sum(rows_per_shard)
        self.rank, self.world_size = distributed.rank(), distributed.world_size()
        self.shards = owned_shards(self.num_shards, self.rank, self.world_size)
        counts = torch.tensor([rows_per_shard[shard] for shard in self.shards])
        self.num_rows = int(counts.sum())
        self._counts, self._offsets = counts, counts.cumsum(0) - counts
        self._device = device

    def rows(self, sample_ids: Tensor) -> Tensor:
        """Local rows of sample IDs (B,), which are on the CPU: checking them waits for no GPU.

        `NO_ROW` stays as it is.

        Raises:
            InputError: an ID is another rank's or beyond the data.
        """
        shards, rows = sample_ids % self.num_shards, sample_ids // self.num_shards
        has_row = sample_ids != NO_ROW
        foreign = has_row & (shards % self.world_size != self.rank)
        if foreign.any():
            stray = int(sample_ids[foreign][0])
            raise InputError(
                f"sample_id {stray} belongs to rank {stray % self.num_shards % self.world_size}, "
                f"not to rank {self.rank}: each rank reads its own shards only"
            )
        local_shards = shards // self.world_size
        beyond = has_row & ((sample_ids < 0) | (rows >= self._counts[local_shards]))
        if beyond.any():
            raise InputError(f"sample_id {int(sample_ids[beyond][0])} is not in the training data")
        local = (self._offsets[local_shards] + rows).where(has_row, NO_ROW)
        return local.to(self._device, non_blocking=True)

    def read(self, of_shard: Callable[[int], Tensor]) -> Tensor:
        """Values of this rank's rows, from those of each shard."""
        return torch.cat([of_shard(shard) for shard in self.shards]).to(self._device)

    def by_shard(self, values: Tensor) -> tuple[Tensor, ...]:
        """Values of this rank's rows, cut into those of each of its shards."""
        return values.split([self._rows_per_shard[shard] for shard in self.shards])

    def gather(self, values: Tensor) -> Tensor | None:
        """Values of this rank's rows -> those of all instances by sample ID, on rank 0 only."""
        parts = distributed.gather_rows(values)
        if parts is None:
            return None
        result = torch.empty(self.total, dtype=values.dtype)
        for rank, part in enumerate(parts):
            shards = owned_shards(self.num_shards, rank, self.world_size)
            counts = [self._rows_per_shard[shard] for shard in shards]
            for shard, rows in zip(shards, part.split(counts), strict=True):
                result[shard :: self.num_shards] = rows
        return result
