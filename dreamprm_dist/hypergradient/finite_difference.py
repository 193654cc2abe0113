"""Central difference along v, as DARTS and the reference implementation take it.

(f(theta + eps v) - f(theta - eps v)) / (2 eps) with eps = 0.01 / ||v|| (Liu et al.,
arXiv:1806.09055, section 2.3). For parity and as a cross-check: its error is of order eps^2 in
float32 and tens of percent in bf16, where most weights absorb eps v in their rounding.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dreamprm_dist.losses import Observation

RADIUS = 0.01


@torch.no_grad()
def finite_difference(
    function: Callable[[Mapping[str, Tensor]], Observation],
    parameters: Mapping[str, Tensor],
    v: Mapping[str, Tensor],
    radius: float = RADIUS,
) -> tuple[Observation, Observation]:
    """The observation and its derivative along v; see the package's docstring.

    Args:
        radius: length of the step eps v.

    The moved parameters are copies: whatever is raised on the way, the PRM is as it was.
    """
    norms = [
        torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32))
        for t in v.values()
    ]
    epsilon = radius / torch.stack(norms).norm().clamp_min(torch.finfo(torch.float32).tiny)

    def moved(factor: float) -> Observation:
        return function(
            {n: p + factor * epsilon * v[n] if n in v else p for n, p in parameters.items()}
        )

    higher, lower = moved(1.0), moved(-1.0)
    derivative = [(a - b) / (2 * epsilon) for a, b in zip(higher, lower, strict=True)]
    return function(parameters), Observation(*derivative)
