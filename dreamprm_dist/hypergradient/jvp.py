"""Forward-mode directional derivative: exact in the model's own precision.

One Jacobian-vector product gives <grad l_i, v> for all instances of a batch at once, with no
backward pass and no step size. It is the mixed derivative of the one-step hypergradient of DARTS
(Liu et al., arXiv:1806.09055, equation 7) without its finite difference.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.autograd import forward_ad


def jvp(
    losses: Callable[[Mapping[str, Tensor]], Tensor],
    parameters: Mapping[str, Tensor],
    v: Mapping[str, Tensor],
) -> Tensor:
    """<grad l_i, v> for each instance, shape (B,); see the package's docstring."""
    with torch.no_grad(), forward_ad.dual_level():
        duals = {
            name: forward_ad.make_dual(parameter.detach(), v[name])
            for name, parameter in parameters.items()
        }
        return forward_ad.unpack_dual(losses(duals)).tangent
