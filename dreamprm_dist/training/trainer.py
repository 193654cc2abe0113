"""Bi-level training: lower steps on weighted data, then one upper step on the weights.

Lower level: theta minimises (1/N) sum_i w_i l_i(theta). Upper level: the weights minimise the meta
loss at the resulting theta. After an unroll of lower steps to theta',

    v = grad_theta L_meta(theta'),    dL/dw_i = -(1/G) <grad l_i(theta'), v>,

the one-step hypergradient of DARTS (arXiv:1806.09055) without the factor lr, for the G instances of
the last lower batch. With `unroll_window: all` each lower batch receives it, at the parameters
right after its own step and with v taken there, from one meta batch for the whole unroll. With
`rollback` the unroll is then undone and taken again with the new weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call

from dreamprm_dist import distributed
from dreamprm_dist.hypergradient import ESTIMATORS
from dreamprm_dist.losses import Observation, instance_losses, meta_losses
from dreamprm_dist.prm.batch import Batch
from dreamprm_dist.prm.model import StepOutput
from dreamprm_dist.reweighters.base import Reweighter
from dreamprm_dist.training.config import TrainConfig
from dreamprm_dist.training.engine import Engine, LowerStep
from dreamprm_dist.training.metrics import PhaseTimer
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
    """

    def __init__(
        self,
        engine: Engine,
        reweighter: Reweighter,
        config: TrainConfig,
        label_ids: Mapping[str, int],
    ):
        self.engine, self.reweighter = engine, reweighter
        self.config, self.label_ids = config, label_ids
        self.estimator = ESTIMATORS[config.hypergradient.hypergradient]
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
        for position, micro_batches in enumerate(window, start=1):
            lower = self.lower_step(micro_batches)
            if meta and (position == len(window) or config.unroll_window == "all"):
                v, losses, norm = self.meta_gradient(meta)
                self.add_hypergradient(micro_batches, v)
        upper = self._upper_step(losses, norm) if meta else None
        if before is not None:
            self.engine.zero.restore(before)
            for micro_batches in window:
                lower = self.lower_step(micro_batches)
        return Iteration(lower=lower, upper=upper)

    def lower_step(self, micro_batches: MicroBatches) -> LowerStep:
        """theta <- AdamW on (1/G) sum_i w_i l_i(theta)."""
        with self.phases("lower"):
            step = self.engine.lower_step(micro_batches, self._weigh)
        self.skipped_steps.note(not step.applied)
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
            if self.estimator.precondition:
                v = self.engine.precondition(v, self.estimator.precondition)
        return v, losses, torch.stack(norms).norm()

    def add_hypergradient(self, micro_batches: MicroBatches, v: Mapping[str, Tensor]) -> None:
        """Add a lower batch's hypergradient at the present parameters to the next upper step."""
        with self.phases("hypergradient"):
            for batch in micro_batches:
                values, derivatives = self.directional_derivative(batch, v)
                self.reweighter.add_hypergradient(
                    batch, values, derivatives, self._global_batch_size
                )

    def _upper_step(self, losses: Tensor, norm: Tensor) -> UpperStep:
        lr = self.reweighter.lr
        with self.phases("upper"):
            squared_norm = self.reweighter.step()
        self.skipped_steps.note(bool(squared_norm.isnan()))
        return UpperStep(
            meta_losses=losses, meta_gradient_norm=norm, lr=lr, squared_norm=squared_norm
        )

    def _weigh(self, output: StepOutput, losses: Tensor, batch: Batch) -> Tensor:
        return self.reweighter.weights(batch, self.reweighter.features(output, losses, batch))

    def meta_losses(self, output: StepOutput, batch: Batch) -> Tensor:
        """Meta losses (B,) of a batch of meta solutions, from what the PRM says of it."""
        return meta_losses(
            output.logits, batch.step_rows, batch.true_false, self.label_ids, self.config.meta_loss
        )

    def directional_derivative(
        self, batch: Batch, v: Mapping[str, Tensor]
    ) -> tuple[Observation, Observation]:
        """The upper level's view of a micro-batch, and its derivative along v."""
        module = self.engine.module

        def observe(parameters: Mapping[str, Tensor]) -> Observation:
            output = functional_call(module, dict(parameters), (batch,))
            losses = instance_losses(output.logits, batch.step_targets, batch.step_rows, len(batch))
            return Observation(losses, self.reweighter.features(output, losses, batch))

        mode = module.forward_mode() if self.estimator.forward_mode else contextlib.nullcontext()
        with mode:
            return self.estimator.function(observe, self.engine.parameters, v)
