"""Estimators of the hypergradient: the derivative of each instance's loss along v.

An estimator is called with

- `losses`: parameters by name -> instance losses (B,), a pure function,
- `parameters`: the trained parameters by name,
- `v`: the meta gradient by the same names,

and returns the B directional derivatives <grad l_i, v> at `parameters`. The reweighter turns them
into the hypergradient of what it holds.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from dreamprm_dist.hypergradient.jvp import jvp


class Estimator(NamedTuple):
    """An estimator and whether it differentiates in forward mode (which no flash kernel can)."""

    function: Callable[..., Tensor]
    forward_mode: bool


ESTIMATORS = {"jvp": Estimator(jvp, forward_mode=True)}
