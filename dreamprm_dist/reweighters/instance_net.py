"""A small MLP from what the PRM says of an instance to its weight (DreamPRM-1.5).

Its size does not depend on the data. Each labelled step is one row of features; the raw weight is
the mean of the MLP's outputs over an instance's rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dreamprm_dist.prm.batch import Batch
from dreamprm_dist.prm.model import StepOutput
from dreamprm_dist.reweighters.activations import activate
from dreamprm_dist.reweighters.base import ReweighterContext
from dreamprm_dist.reweighters.features import FEATURES, labelled
from dreamprm_dist.reweighters.replicated import ReplicatedReweighter

if TYPE_CHECKING:
    from dreamprm_dist.reweighters.config import MetaOptimizerConfig, ReweighterConfig


class InstanceNet(ReplicatedReweighter):
    """The net, replicated. At the start every raw weight is `initialization`."""

    reads_prm = True

    def __init__(
        self, config: ReweighterConfig, optimizer: MetaOptimizerConfig, context: ReweighterContext
    ):
        super().__init__(config, optimizer, context)
        self.differentiate_weights = config.differentiate_weights
        self._feature = FEATURES[config.instance_net_input]
        self._label_ids = context.label_ids
        width = self._feature.width(context.hidden_size)
        # A generator of its own, so that every rank has the same net whatever it drew before.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.seed)
            net = mlp(width, config.hidden_dim, config.num_layers)
        *_, weight, bias = net.parameters()
        nn.init.zeros_(weight)
        nn.init.constant_(bias, config.initialization)
        self._learn(net.to(context.device))

    def features(self, output: StepOutput, losses: Tensor, batch: Batch) -> Tensor:
        features = self._feature.read(output, losses, batch, self._label_ids)
        return features if self.differentiate_weights else features.detach()

    def raw_weights_of(self, batch: Batch, features: Tensor) -> Tensor:
        outputs = self.module(features.to(next(self.module.parameters()).dtype))[:, 0]
        if not self._feature.each_step:
            return outputs
        rows = batch.step_rows[labelled(batch)]
        zeros = outputs.new_zeros(len(batch))
        counts = zeros.index_add(0, rows, torch.ones_like(outputs))
        return zeros.index_add(0, rows, outputs) / counts.clamp(min=1)

    def activate(self, raw: Tensor) -> Tensor:
        return activate(raw, self.config)


def mlp(width: int, hidden_dim: int, num_layers: int) -> nn.Sequential:
    """`num_layers` hidden layers with LeakyReLU, then one output: (n, width) -> (n, 1)."""
    widths = [width] + [hidden_dim] * num_layers
    layers: list[nn.Module] = []
    for i in range(num_layers):
        layers += [nn.Linear(widths[i], widths[i + 1]), nn.LeakyReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 1))
