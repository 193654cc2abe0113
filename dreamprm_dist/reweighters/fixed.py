"""Weights that were found before, in another run or by another method: the PRM alone is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from dreamprm_dist.prm.batch import Batch
from dreamprm_dist.reweighters.base import ReweighterContext
from dreamprm_dist.reweighters.uniform import Uniform

if TYPE_CHECKING:
    from dreamprm_dist.reweighters.config import MetaOptimizerConfig, ReweighterConfig


class Fixed(Uniform):
    """The given weights of this rank's rows, as they are; as of `Uniform`, nothing is learned."""

    def __init__(
        self, config: ReweighterConfig, optimizer: MetaOptimizerConfig, context: ReweighterContext
    ):
        super().__init__(config, optimizer, context)
        assert context.given_weights
        self._weights = self.partition.read(context.given_weights)

    def raw_weights_of(self, batch: Batch, features: Tensor) -> Tensor:
        return self._weights[self.partition.rows(batch.sample_ids)]
