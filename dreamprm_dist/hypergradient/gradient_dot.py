"""Reverse mode: one backward pass an instance, then its dot product with v.

What JVP computes, by the other mode of differentiation and at B times the cost of a backward pass:
for models whose operations have no forward mode. Step features have no derivative here, so weights
that depend on the PRM's parameters are refused.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dreamprm_dist.losses import Observation


def gradient_dot(
    function: Callable[[Mapping[str, Tensor]], Observation],
    parameters: Mapping[str, Tensor],
    v: Mapping[str, Tensor],
) -> tuple[Observation, Observation]:
    """The observation and its derivative along v; see the package's docstring."""
    with torch.enable_grad():
        observation = function(parameters)
    products = []
    for loss in observation.losses:
        gradients = torch.autograd.grad(
            loss, [parameters[name] for name in v], retain_graph=True, materialize_grads=True
        )
        # Summed in float32, for a bf16 sum over a billion products would lose them.
        pairs = zip(gradients, v.values(), strict=True)
        wide = torch.promote_types(loss.dtype, torch.float32)
        products.append(torch.stack([(g.to(wide) * t.to(wide)).sum() for g, t in pairs]).sum())
    return (
        Observation(*(value.detach() for value in observation)),
        Observation(torch.stack(products), torch.zeros_like(observation.features)),
    )
