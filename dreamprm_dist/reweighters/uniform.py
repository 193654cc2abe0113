"""Every weight is 1: plain fine-tuning, as cold start and as baseline."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dreamprm_dist.losses import Observation
from dreamprm_dist.prm.batch import Batch
from dreamprm_dist.reweighters.base import Reweighter


class Uniform(Reweighter):
    """Nothing is learned, so that no upper step is taken and no weights are exported."""

    learns = False

    def raw_weights_of(self, batch: Batch, features: Tensor) -> Tensor:
        return torch.ones(len(batch), device=self.device)

    def activate(self, raw: Tensor) -> Tensor:
        return raw

    def add_hypergradient(
        self, batch: Batch, values: Observation, derivatives: Observation, size: int
    ) -> None:
        pass

    def forget(self) -> None:
        pass

    def step(self) -> Tensor:
        return torch.zeros((), device=self.device)

    def statistics(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        pass
