"""Measurements in one pass, without gradients, over all rows of every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from dreamprm_dist import distributed
from dreamprm_dist.prm.batch import Batch
from dreamprm_dist.prm.chat import IGNORE_INDEX
from dreamprm_dist.prm.model import PRM, StepOutput
from dreamprm_dist.reweighters.base import Reweighter
from dreamprm_dist.reweighters.partition import RowPartition


@torch.no_grad()
def raw_weights_now(
    prm: PRM,
    reweighter: Reweighter,
    batches: Iterable[Batch],
    losses_of: Callable[[StepOutput, Batch], Tensor],
) -> Tensor:
    """Raw weights (local rows,) of this rank's rows by the present PRM.

    Args:
        batches: each of these rows once, on the device.
        losses_of: what the PRM says and a batch to the instance losses (B,).
    """
    raw = torch.empty(reweighter.partition.num_rows, device=reweighter.device)
    for batch in batches:
        assert batch.weighted.all()
        output = prm(batch)
        losses = losses_of(output, batch)
        features = reweighter.features(output, losses, batch)
        rows = reweighter.partition.rows(batch.sample_ids)
        raw[rows] = reweighter.raw_weights_of(batch, features)
    return raw


@torch.no_grad()
def instance_losses_now(
    prm: PRM,
    partition: RowPartition,
    batches: Iterable[Batch],
    losses_of: Callable[[StepOutput, Batch], Tensor],
    device: torch.device,
) -> Tensor:
    """Unweighted instance losses (local rows,) of this rank's rows by the present PRM.

    NaN where no step is labelled.

    Args:
        partition: of the rows.
        batches: each of these rows once, on the device.
        losses_of: what the PRM says and a batch to the instance losses (B,).
    """
    result = torch.empty(partition.num_rows, device=device)
    for batch in batches:
        losses = losses_of(prm(batch), batch)
        has_label = torch.zeros(len(batch), dtype=torch.bool, device=device)
        has_label[batch.step_rows[batch.step_targets != IGNORE_INDEX]] = True
        result[partition.rows(batch.sample_ids)] = losses.where(has_label, torch.nan)
    return result


@torch.no_grad()
def mean_loss(
    prm: PRM,
    batches: Iterable[Batch],
    loss: Callable[[StepOutput, Batch], Tensor],
    device: torch.device,
) -> float:
    """The mean over all ranks' rows of a loss, from what the PRM says and a batch to (B,).

    Args:
        batches: each row of this rank once, on the device.
    """
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        losses = loss(prm(batch), batch).double()
        totals += torch.stack([losses.sum(), losses.new_tensor(len(losses))])
    total, count = distributed.all_reduce_sum(totals).tolist()
    return total / count
