"""Estimators of the hypergradient: derivatives along v of what the lower level computes.

`ghost` takes them from the backward pass of the lower step itself, with a v that is known before
it; see `ghost.Ghost`. The others are taken after it: such an estimator is called with

- `function`: parameters by name -> an `Observation` of a micro-batch, a pure function,
- `parameters`: the trained parameters by name,
- `v`: the meta gradient by the same names, or by some of them (`hypergradient_scope`),

and returns the Observation at `parameters` and its derivative along v, both detached: the instance
losses' is <grad l_i, v>. The reweighter turns them into the hypergradient of what it holds.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from dreamprm_dist.errors import InputError
from dreamprm_dist.flags import FlagGroup, flag
from dreamprm_dist.hypergradient.finite_difference import finite_difference
from dreamprm_dist.hypergradient.jvp import jvp


class Estimator(NamedTuple):
    """An estimator and what it asks of the run.

    Attributes:
        function: see the package's docstring; None where the lower step itself gives them.
        forward_mode: it differentiates in forward mode, which no flash kernel can.
        differentiates_features: it also gives the derivative of the step features; without it,
            weights must not depend on the PRM's parameters.
        exact_in_bf16: its error in bf16 is that of the precision.
    """

    function: Callable | None
    forward_mode: bool = False
    differentiates_features: bool = True
    exact_in_bf16: bool = True

    @property
    def in_lower_step(self) -> bool:
        """Whether v is taken before the lower step, which gives the derivatives."""
        return self.function is None


ESTIMATORS = {
    "ghost": Estimator(None, differentiates_features=False),
    "jvp": Estimator(jvp, forward_mode=True),
    "finite_difference": Estimator(finite_difference, exact_in_bf16=False),
}
# One that was a name of its own: jvp with precondition adam.
SAMA = "sama"


@dataclass
class HypergradientConfig(FlagGroup):
    """The estimator of the hypergradient."""

    _argument_group_name: ClassVar[str] = "hypergradient"

    removed: ClassVar = {"hypergradient": {"gradient_dot": "use ghost or jvp"}}

    hypergradient: str = flag(
        "jvp",
        "Estimator of the hypergradient. ghost: from the backward pass of the lower step, for a "
        "third of what jvp costs; jvp: the paper's order, after the step; sama: jvp with "
        "precondition adam.",
        choices=[*ESTIMATORS, SAMA],
    )
    precondition: Literal["none", "adam"] = flag(
        "none", "What v is multiplied by: adam: the derivative of the lower level's Adam step."
    )
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

    @property
    def estimator(self) -> Estimator:
        """What `hypergradient` names."""
        return ESTIMATORS["jvp" if self.hypergradient == SAMA else self.hypergradient]

    @property
    def preconditions(self) -> bool:
        """Whether v is seen through the lower level's Adam step."""
        return self.precondition == "adam" or self.hypergradient == SAMA
