"""One learned weight per data set, as DreamPRM (arXiv:2505.20241): softplus over its mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamprm_dist.prm.batch import Batch
from dreamprm_dist.reweighters.base import ReweighterContext
from dreamprm_dist.reweighters.replicated import ReplicatedReweighter

if TYPE_CHECKING:
    from dreamprm_dist.reweighters.config import MetaOptimizerConfig, ReweighterConfig


class DomainTable(ReplicatedReweighter):
    """A raw weight for each `dataset` in the records, replicated.

    Attributes:
        names: the data sets in alphabetical order; records without one share "".
    """

    def __init__(
        self, config: ReweighterConfig, optimizer: MetaOptimizerConfig, context: ReweighterContext
    ):
        super().__init__(config, optimizer, context)
        datasets = [
            [name or "" for name in context.read_datasets(shard)]
            for shard in range(len(context.rows_per_shard))
        ]
        self.names = sorted({name for shard in datasets for name in shard})
        index = {name: i for i, name in enumerate(self.names)}
        self._domain_of_row = torch.tensor(
            [index[name] for shard in self.partition.shards for name in datasets[shard]],
            device=context.device,
        )
        raw = torch.full((len(self.names),), config.initialization, device=context.device)
        self.raw_weights = nn.Parameter(raw)
        self._learn(nn.ParameterList([self.raw_weights]))

    def raw_weights_of(self, batch: Batch, features: Tensor) -> Tensor:
        rows = self.partition.rows(batch.sample_ids)
        return self.raw_weights[self._domain_of_row[rows]]

    def activate(self, raw: Tensor) -> Tensor:
        return F.softplus(raw) / F.softplus(self.raw_weights).mean()

    def local_raw_weights(self) -> Tensor:
        return self.raw_weights.detach()[self._domain_of_row]

    def statistics(self) -> dict:
        """As of every replicated reweighter, with the weight of each data set under `domains`."""
        weights = self.activate(self.raw_weights).tolist()
        return super().statistics() | {"domains": dict(zip(self.names, weights, strict=True))}
