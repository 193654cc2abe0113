"""From raw weights to weights, as the reference names them, and the paper's projection."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from dreamprm_dist.reweighters.config import ReweighterConfig

SLOPE = 0.01  # of LeakyReLU below 0, torch's own
SAME = 1e-5  # relative: as a sigmoid's logit in float32 gives a weight back


class Activation(NamedTuple):
    """A function of raw weights, and the way back.

    Attributes:
        function: raw weights to weights.
        inverse: to each weight that it gives a raw one; of another weight, anything.
        gives: which weights it gives, in words, with fields of the configuration.
    """

    function: Callable[[Tensor, ReweighterConfig], Tensor]
    inverse: Callable[[Tensor, ReweighterConfig], Tensor]
    gives: str = "any finite number"


def _bounded(weights: Tensor, config: ReweighterConfig) -> Tensor:
    return weights.clamp(config.weight_min, config.weight_max)


_BOUNDS = "from weight_min {weight_min} to weight_max {weight_max}"
ACTIVATIONS: dict[str, Activation] = {
    "LeakyReLU": Activation(
        lambda raw, config: F.leaky_relu(raw, SLOPE),
        lambda weights, config: F.leaky_relu(weights, 1 / SLOPE),
    ),
    "ReLU": Activation(
        lambda raw, config: F.relu(raw), lambda weights, config: F.relu(weights), "0 or more"
    ),
    "No": Activation(lambda raw, config: raw, lambda weights, config: weights),
    "sigmoid": Activation(
        lambda raw, config: raw.sigmoid(),
        lambda weights, config: weights.logit(),
        "above 0 and below 1",
    ),
    "Clip": Activation(_bounded, _bounded, _BOUNDS),
    # The bounds are kept by projecting raw weights after each step, so that a weight at a bound
    # still receives its hypergradient.
    "Project": Activation(lambda raw, config: raw, _bounded, _BOUNDS),
}


def activate(raw: Tensor, config: ReweighterConfig) -> Tensor:
    """Raw weights to weights, by the run's activation."""
    return ACTIVATIONS[config.activation_function].function(raw, config)


def raw_weights_for(weights: Tensor, config: ReweighterConfig) -> Tensor:
    """A raw weight for each weight; NaN where the run's activation gives no such weight."""
    raw = ACTIVATIONS[config.activation_function].inverse(weights, config)
    found = raw.isfinite() & activate(raw, config).isclose(weights, rtol=SAME, atol=0)
    return raw.where(found, torch.nan)
