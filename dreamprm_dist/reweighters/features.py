"""Features of an instance that an instance net may read, from one forward pass of the PRM."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dreamprm_dist.prm.batch import Batch
from dreamprm_dist.prm.chat import IGNORE_INDEX
from dreamprm_dist.prm.model import StepOutput


class Feature(NamedTuple):
    """Attributes:
    width: numbers that one step (or instance) has, from the PRM's hidden size.
    read: (output, losses, batch, label_ids) -> (n, width), n labelled steps or B instances.
    each_step: there is a row for each labelled step, not for each instance.
    """

    width: Callable[[int], int]
    read: Callable[[StepOutput, Tensor, Batch, dict[str, int]], Tensor]
    each_step: bool


def labelled(batch: Batch) -> Tensor:
    """Mask (n,) of the steps that have a label."""
    return batch.step_targets != IGNORE_INDEX


def _step_probabilities(output, losses, batch, label_ids) -> Tensor:
    logits = output.logits[labelled(batch)][:, [label_ids["+"], label_ids["-"]]]
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)


FEATURES = {
    # As the reference implementation: P(+) and P(-) among the two. Blind to the label.
    "step_probabilities": Feature(lambda hidden: 2, _step_probabilities, each_step=True),
    # As the paper says: the last hidden state where a step is scored.
    "representation": Feature(
        lambda hidden: hidden,
        lambda output, losses, batch, label_ids: output.hidden[labelled(batch)].to(losses.dtype),
        each_step=True,
    ),
    # As Meta-Weight-Net (Shu et al., arXiv:1902.07379): the instance's own loss.
    "loss": Feature(
        lambda hidden: 1, lambda output, losses, batch, label_ids: losses[:, None], each_step=False
    ),
}
