"""One learned weight a data set, as DreamPRM (arXiv:2505.20241): softplus over its mean."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamprm_dist.prm.batch import Batch
from dreamprm_dist.reweighters.base import Surroundings
from dreamprm_dist.reweighters.replicated import ReplicatedReweighter
from dreamprm_dist.training.config import UpperConfig


class DomainTable(ReplicatedReweighter):
    """A raw weight for each `dataset` in the records, replicated.

    Attributes:
        names: the data sets in alphabetical order; records without one share "".
    """

    def __init__(self, config: UpperConfig, surroundings: Surroundings):
        super().__init__(config, surroundings)
        datasets = [
            [name or "" for name in surroundings.read_datasets(shard)]
            for shard in range(len(surroundings.rows_per_shard))
        ]
        self.names = sorted({name for shard in datasets for name in shard})
        index = {name: i for i, name in enumerate(self.names)}
        self._domain_of_row = torch.tensor(
            [index[name] for shard in self.partition.shards for name in datasets[shard]],
            device=surroundings.device,
        )
        raw = torch.full((len(self.names),), config.initialization, device=surroundings.device)
        self._learn(nn.ParameterList([nn.Parameter(raw)]))

    def raw_weights_of(self, batch: Batch, features: Tensor) -> Tensor:
        rows = self.partition.rows(batch.sample_ids)
        return self.module[0][self._domain_of_row[rows]]

    def activate(self, raw: Tensor) -> Tensor:
        return F.softplus(raw) / F.softplus(self.module[0]).mean()

    def local_raw_weights(self) -> Tensor:
        return self.module[0].detach()[self._domain_of_row]

    def statistics(self) -> dict:
        """As of every replicated reweighter, with the weight of each data set under `domains`."""
        weights = self.activate(self.module[0]).tolist()
        return super().statistics() | {"domains": dict(zip(self.names, weights, strict=True))}
