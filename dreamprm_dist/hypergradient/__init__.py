"""Estimators of the hypergradient: derivatives along v of what the lower level computes.

An estimator is called with

- `function`: parameters by name -> an `Observation` of a micro-batch, a pure function,
- `parameters`: the trained parameters by name,
- `v`: the meta gradient by the same names, or by some of them (`hypergradient_scope`),

and returns the Observation at `parameters` and its derivative along v, both detached: the instance
losses' is <grad l_i, v>. The reweighter turns them into the hypergradient of what it holds.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from dreamprm_dist.errors import InputError
from dreamprm_dist.flags import FlagGroup, flag
from dreamprm_dist.hypergradient.finite_difference import finite_difference
from dreamprm_dist.hypergradient.gradient_dot import gradient_dot
from dreamprm_dist.hypergradient.jvp import jvp
from dreamprm_dist.hypergradient.sama import adam_derivative


class Estimator(NamedTuple):
    """An estimator and what it asks of the run.

    Attributes:
        function: see the package's docstring.
        forward_mode: it differentiates in forward mode, which no flash kernel can.
        differentiates_features: it also gives the derivative of the step features; without it,
            weights must not depend on the PRM's parameters.
        exact_in_bf16: its error in bf16 is that of the precision.
        precondition: gives the diagonal that v is multiplied by first, from the lower optimizer's
            state of some parameters after its step: (first moment, second moment, the gradient
            that the optimizer was given, steps taken, betas, eps) -> diagonal, all tensors of one
            shape.
    """

    function: Callable
    forward_mode: bool = False
    differentiates_features: bool = True
    exact_in_bf16: bool = True
    precondition: Callable[..., Tensor] | None = None


ESTIMATORS = {
    "jvp": Estimator(jvp, forward_mode=True),
    "finite_difference": Estimator(finite_difference, exact_in_bf16=False),
    "sama": Estimator(jvp, forward_mode=True, precondition=adam_derivative),
    "gradient_dot": Estimator(gradient_dot, differentiates_features=False),
}


@dataclass
class HypergradientConfig(FlagGroup):
    """The estimator of the hypergradient."""

    _argument_group_name: ClassVar[str] = "hypergradient"

    hypergradient: str = flag("jvp", "Estimator of the hypergradient.", choices=ESTIMATORS)
    hypergradient_scope: str = flag(
        "all",
        "Parameters that v covers: all, language_model, or last_N_layers such as last_4_layers.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"all|language_model|last_[1-9]\d*_layers", self.hypergradient_scope):
            raise InputError(
                f"hypergradient_scope {self.hypergradient_scope!r} is unknown; use all, "
                "language_model, or last_N_layers such as last_4_layers"
            )
