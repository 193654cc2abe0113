"""Forward-mode directional derivative: exact in the model's own precision.

One Jacobian-vector product gives <grad l_i, v> for all instances of a batch at once, with no
backward pass and no step size. It is the mixed derivative of the one-step hypergradient of DARTS
(Liu et al., arXiv:1806.09055, equation 7) without its finite difference.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dreamprm_dist.losses import Observation


def jvp(
    function: Callable[[Mapping[str, Tensor]], Observation],
    parameters: Mapping[str, Tensor],
    v: Mapping[str, Tensor],
) -> tuple[Observation, Observation]:
    """The observation and its derivative along v; see the package's docstring."""
    with torch.no_grad(), forward_ad.dual_level():
        # A copy, for a tangent takes as much memory as its tensor's storage, and ZeRO keeps all
        # parameters in one: each of them would be given a tangent as large as the model.
        duals = {
            name: forward_ad.make_dual(p.detach().clone(), v[name]) if name in v else p.detach()
            for name, p in parameters.items()
        }
        pairs = [forward_ad.unpack_dual(value) for value in function(duals)]
    # Without a tangent a value does not depend on what v covers.
    tangents = [
        torch.zeros_like(pair.primal) if pair.tangent is None else pair.tangent for pair in pairs
    ]
    return Observation(*(pair.primal for pair in pairs)), Observation(*tangents)
