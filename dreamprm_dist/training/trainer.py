"""Bi-level training: lower steps on weighted data, then one upper step on the weights.

Lower level: theta minimises (1/N) sum_i w_i l_i(theta). Upper level: the weights minimise the meta
loss at the resulting theta. The one-step hypergradient of DARTS (arXiv:1806.09055), without the
factor lr, is for the G instances of a lower batch

    v = grad_theta L_meta,    dL/dw_i = -(1/G) <grad l_i, v>.

Most estimators take both after the lower step. `ghost` takes v at the start of the unroll and the
products from each lower step itself; the two orders differ by O(lr). The last lower batch of an
unroll receives its hypergradient, and with `unroll_window: all` each of them. With `rollback` the
unroll is then undone and taken again with the new weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dreamprm_dist import distributed
from dreamprm_dist.hypergradient.ghost import Ghost
from dreamprm_dist.losses import Observation, instance_losses, meta_losses
from dreamprm_dist.prm.batch import Batch
from dreamprm_dist.prm.model import StepOutput
from dreamprm_dist.reweighters.base import Reweighter
from dreamprm_dist.training.config import TrainConfig
from dreamprm_dist.training.engine import Engine, LowerStep
from dreamprm_dist.training.metrics import PhaseTimer
from dreamprm_dist.training.passes import directional_derivative
from dreamprm_dist.training.skipped_steps import SkippedSteps

# This rank's part of a global batch, on its device.
MicroBatches = Sequence[Batch]


@dataclass(frozen=True, kw_only=True)
class UpperStep:
    """An upper step as this rank saw it.

    Attributes:
        meta_losses: (B,) of this rank's part of the meta batch.
        meta_gradient_norm: norm of v, a scalar, the same on all ranks.
        lr: learning rate of the weights.
        squared_norm: this rank's share of the hypergradient's squared norm, a scalar; NaN when
            the step was not applied.
    """

    meta_losses: Tensor
    meta_gradient_norm: Tensor
    lr: float
    squared_norm: Tensor


@dataclass(frozen=True, kw_only=True)
class Iteration:
    """An outer iteration as this rank saw it: its last lower step, and its upper step if any."""

    lower: LowerStep
    upper: UpperStep | None


class BilevelTrainer:
    """The algorithm, one outer iteration at a time. It knows no files and no data streams.

    Args:
        engine: the PRM under ZeRO.
        reweighter: the weights.
        config: of the run.
        label_ids: token ids of `+` and `-`.
        ghost: that estimator, where it is the run's.
    """

    def __init__(
        self,
        engine: Engine,
        reweighter: Reweighter,
        config: TrainConfig,
        label_ids: Mapping[str, int],
        ghost: Ghost | None = None,
    ):
        self.engine, self.reweighter = engine, reweighter
        self.config, self.label_ids = config, label_ids
        self.ghost = ghost
        self.phases = PhaseTimer(engine.device)
        self.skipped_steps = SkippedSteps(config.run.max_bad_steps)
        self._global_batch_size = config.global_batch_sizes(distributed.world_size())["batch_size"]

    def iteration(self, window: Sequence[MicroBatches], meta: MicroBatches) -> Iteration:
        """One outer iteration.

        Args:
            window: the lower batches of the unroll.
            meta: the meta batch; empty where no weights are learned.
        """
        config = self.config.upper
        before = self.engine.zero.snapshot() if config.rollback and meta else None
        if meta and self.ghost:
            v, losses, norm = self.meta_gradient(meta)
        for position, micro_batches in enumerate(window, start=1):
            learns = meta and (position == len(window) or config.unroll_window == "all")
            lower = self.lower_step(micro_batches, v if learns and self.ghost else None)
            if learns and not self.ghost:
                v, losses, norm = self.meta_gradient(meta)
                self.add_hypergradient(micro_batches, v)
        upper = self._upper_step(losses, norm) if meta else None
        if before is not None:
            self.engine.zero.restore(before)
            for micro_batches in window:
                lower = self.lower_step(micro_batches)
        return Iteration(lower=lower, upper=upper)

    def lower_step(
        self, micro_batches: MicroBatches, v: Mapping[str, Tensor] | None = None
    ) -> LowerStep:
        """theta <- AdamW on (1/G) sum_i w_i l_i(theta).

        Args:
            v: for `ghost`, to add the batch's hypergradient at theta to the next upper step. A
                step that is skipped adds none.
        """
        seen: list[Observation] = []

        def weigh(output: StepOutput, losses: Tensor, batch: Batch) -> Tensor:
            features = self.reweighter.features(output, losses, batch)
            seen.append(Observation(losses.detach(), features.detach()))
            return self.reweighter.weights(batch, features)

        tapping = partial(self.ghost.tapping, v=v) if self.ghost and v is not None else None
        with self.phases("lower"):
            step = self.engine.lower_step(micro_batches, self.lower_losses, weigh, tapping)
        self.skipped_steps.note(not step.applied)
        if step.products is not None and step.applied:
            with self.phases("hypergradient"):
                products = step.products.split([len(batch) for batch in micro_batches])
                for batch, values, of_batch in zip(micro_batches, seen, products, strict=True):
                    derivatives = Observation(of_batch, torch.zeros_like(values.features))
                    self._add(batch, values, derivatives)
        return step

    def meta_gradient(
        self, micro_batches: MicroBatches
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """v at the present parameters by name, the meta losses (B,), and the norm of v.

        Where the estimator preconditions v, the norm is that of v before.
        """
        with self.phases("meta"):
            v, losses = self.engine.meta_gradient(micro_batches, self.meta_losses)
            norms = [torch.linalg.vector_norm(t, dtype=torch.float32) for t in v.values()]
            if self.config.hypergradient.preconditions:
                v = self.engine.precondition(v)
        return v, losses, torch.stack(norms).norm()

    def add_hypergradient(self, micro_batches: MicroBatches, v: Mapping[str, Tensor]) -> None:
        """Add a lower batch's hypergradient at the present parameters to the next upper step."""
        with self.phases("hypergradient"):
            for batch in micro_batches:
                self._add(batch, *self.directional_derivative(batch, v))

    def _add(self, batch: Batch, values: Observation, derivatives: Observation) -> None:
        self.reweighter.add_hypergradient(batch, values, derivatives, self._global_batch_size)

    def _upper_step(self, losses: Tensor, norm: Tensor) -> UpperStep:
        lr = self.reweighter.lr
        with self.phases("upper"):
            squared_norm = self.reweighter.step()
        self.skipped_steps.note(bool(squared_norm.isnan()))
        return UpperStep(
            meta_losses=losses, meta_gradient_norm=norm, lr=lr, squared_norm=squared_norm
        )

    def lower_losses(self, output: StepOutput, batch: Batch) -> Tensor:
        """Instance losses (B,) of a batch of training data, from what the PRM says of it."""
        return instance_losses(output.logits, batch, self.config.lower_loss, self.label_ids)

    def meta_losses(self, output: StepOutput, batch: Batch) -> Tensor:
        """Meta losses (B,) of a batch of meta solutions, from what the PRM says of it."""
        return meta_losses(
            output.logits, batch.step_rows, batch.true_false, self.label_ids, self.config.meta_loss
        )

    def directional_derivative(
        self, batch: Batch, v: Mapping[str, Tensor]
    ) -> tuple[Observation, Observation]:
        """The upper level's view of a micro-batch, and its derivative along v."""
        estimator = self.config.hypergradient.estimator
        prm, parameters = self.engine.module, self.engine.parameters
        return directional_derivative(
            prm, estimator, parameters, v, batch, self.lower_losses, self.reweighter.features
        )
