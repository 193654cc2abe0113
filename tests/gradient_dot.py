"""Reverse mode: <grad l_i, v> by one backward pass for each instance."""

from collections.abc import Mapping

import torch
from torch import Tensor


def gradient_dot(
    losses: Tensor, parameters: Mapping[str, Tensor], v: Mapping[str, Tensor]
) -> Tensor:
    """Dot products (B,) of the gradients of losses (B,) with v, in float32 or wider."""
    products = []
    for loss in losses:
        gradients = torch.autograd.grad(
            loss, [parameters[name] for name in v], retain_graph=True, materialize_grads=True
        )
        # Summed in float32, for a bf16 sum over a billion products would lose them.
        pairs = zip(gradients, v.values(), strict=True)
        wide = torch.promote_types(loss.dtype, torch.float32)
        products.append(torch.stack([(g.to(wide) * t.to(wide)).sum() for g, t in pairs]).sum())
    return torch.stack(products)
