"""From raw weights to weights, as the reference names them, and the paper's projection."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from dreamprm_dist.reweighters.config import ReweighterConfig


ACTIVATIONS: dict[str, Callable[[Tensor, ReweighterConfig], Tensor]] = {
    "LeakyReLU": lambda raw, config: F.leaky_relu(raw),
    "ReLU": lambda raw, config: F.relu(raw),
    "No": lambda raw, config: raw,
    "sigmoid": lambda raw, config: raw.sigmoid(),
    "Clip": lambda raw, config: raw.clamp(config.weight_min, config.weight_max),
    # The bounds are kept by projecting raw weights after each step, so that a weight at a bound
    # still receives its hypergradient.
    "Project": lambda raw, config: raw,
}
