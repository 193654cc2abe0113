"""The passes through the PRM that an iteration is made of: no collectives, no DeepSpeed, no files.

The engine and the trainer run them on data; `launch/plan.py` counts them on the meta device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor
from torch.func import functional_call

from dreamprm_dist.hypergradient import Estimator
from dreamprm_dist.hypergradient.tap import TappedBatch
from dreamprm_dist.losses import Observation
from dreamprm_dist.prm.batch import Batch
from dreamprm_dist.prm.model import PRM, StepOutput

Weigh = Callable[[StepOutput, Tensor, Batch], Tensor]
Losses = Callable[[StepOutput, Batch], Tensor]


def lower_loss(
    output: StepOutput, batch: Batch, losses_of: Losses, weigh: Weigh, tapped: TappedBatch | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What a micro-batch goes back from: the mean of its weighted losses.

    Args:
        losses_of: what the PRM says and the batch to the instance losses (B,).
        weigh: what the PRM says, the losses (B,) and the batch to weights (B,).
        tapped: of `ghost`, which weighs in the backward pass.

    Returns:
        The loss, the unweighted instance losses (B,) and the weights (B,).
    """
    losses = losses_of(output, batch)
    weights = weigh(output, losses, batch)
    weighted = tapped.weigh_in_backward(losses, weights) if tapped else weights * losses
    return weighted.mean(), losses, weights


def meta_gradient(
    prm: PRM,
    parameters: Mapping[str, Tensor],
    scope: Collection[str],
    micro_batches: Sequence[Batch],
    loss: Losses,
    scale: Tensor | float,
) -> tuple[dict[str, Tensor], Tensor]:
    """The gradient of the summed meta loss times `scale`, on this rank.

    Args:
        parameters: the trained ones by name.
        scope: names of those that v covers.
        loss: what the PRM says and the batch to losses (B,).

    Returns:
        v by name, added up in float32 over several micro-batches, and the losses.
    """
    inside = [parameters[name] for name in scope]
    # What lies outside the scope is held constant, and so records nothing to go back through.
    constants = {name: p.detach() for name, p in parameters.items() if name not in scope}
    total: list[Tensor] = []
    all_losses = []
    for batch in micro_batches:
        losses = loss(functional_call(prm, constants, (batch,)), batch)
        gradients = unalias(
            torch.autograd.grad(losses.sum() * scale, inside, materialize_grads=True)
        )
        all_losses.append(losses.detach())
        if len(micro_batches) == 1:
            total = gradients
        elif not total:
            total = [gradients.pop(0).float() for _ in inside]
        else:  # one after another: in float32 they would be a second total
            for added in total:
                added += gradients.pop(0)
    v = [added.to(p.dtype) for added, p in zip(total, inside, strict=True)]
    return dict(zip(scope, v, strict=True)), torch.cat(all_losses)


def directional_derivative(
    prm: PRM,
    estimator: Estimator,
    parameters: Mapping[str, Tensor],
    v: Mapping[str, Tensor],
    batch: Batch,
    losses_of: Losses,
    features: Callable[[StepOutput, Tensor, Batch], Tensor],
) -> tuple[Observation, Observation]:
    """The upper level's view of a micro-batch, and its derivative along v.

    Args:
        losses_of: what the PRM says and the batch to the instance losses (B,).
        features: what the PRM says, the losses (B,) and the batch to the reweighter's features.
    """

    def observe(values: Mapping[str, Tensor]) -> Observation:
        output = functional_call(prm, dict(values), (batch,), tie_weights=False)
        losses = losses_of(output, batch)
        return Observation(losses, features(output, losses, batch))

    assert estimator.function is not None
    with prm.forward_mode() if estimator.forward_mode else contextlib.nullcontext():
        return estimator.function(observe, *prm.by_use(parameters, v))


def unalias(gradients: Sequence[Tensor]) -> list[Tensor]:
    """The same gradients, none in the memory of another, so that each may be changed in place.

    Autograd returns views of one tensor where parameters have one gradient, as the class token and
    its position embedding when the batch has a single tile.
    """
    seen, apart = set(), []
    for gradient in gradients:
        storage = gradient.untyped_storage()  # itself: on the meta device none has an address
        apart.append(gradient.clone() if storage in seen else gradient)
        seen.add(storage)
    return apart
