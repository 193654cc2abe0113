"""Estimators of the hypergradient: derivatives along v of what the lower level computes.

An estimator is called with

- `function`: parameters by name -> an `Observation` of a micro-batch, a pure function,
- `parameters`: the trained parameters by name,
- `v`: the meta gradient by the same names, or by some of them (`hypergradient_scope`),

and returns the Observation at `parameters` and its derivative along v, both detached: the instance
losses' is <grad l_i, v>. The reweighter turns them into the hypergradient of what it holds.
"""

from collections.abc import Callable
from typing import NamedTuple

from dreamprm_dist.hypergradient.finite_difference import finite_difference
from dreamprm_dist.hypergradient.gradient_dot import gradient_dot
from dreamprm_dist.hypergradient.jvp import jvp
from dreamprm_dist.hypergradient.sama import adam_derivative


class Estimator(NamedTuple):
    """An estimator and what it asks of its surroundings.

    Attributes:
        function: see the package's docstring.
        forward_mode: it differentiates in forward mode, which no flash kernel can.
        differentiates_features: it also gives the derivative of the step features; without it,
            weights must not depend on the PRM's parameters.
        precondition: the diagonal that v is multiplied by first, from the lower optimizer's state.
    """

    function: Callable
    forward_mode: bool = False
    differentiates_features: bool = True
    precondition: Callable | None = None


ESTIMATORS = {
    "jvp": Estimator(jvp, forward_mode=True),
    "finite_difference": Estimator(finite_difference),
    "sama": Estimator(jvp, forward_mode=True, precondition=adam_derivative),
    "gradient_dot": Estimator(gradient_dot, differentiates_features=False),
}
