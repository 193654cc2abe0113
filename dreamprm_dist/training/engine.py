"""The PRM under DeepSpeed ZeRO: build, lower step, meta gradient."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch import Tensor

from dreamprm_dist import distributed
from dreamprm_dist.errors import InputError
from dreamprm_dist.hypergradient.sama import adam_derivative
from dreamprm_dist.hypergradient.tap import TappedBatch
from dreamprm_dist.prm.batch import Batch
from dreamprm_dist.prm.model import PRM, StepOutput
from dreamprm_dist.reweighters.schedules import build_schedule, follow_schedule
from dreamprm_dist.training.config import TrainConfig
from dreamprm_dist.training.engine_files import CheckpointWriter, make_universal
from dreamprm_dist.training.passes import lower_loss, meta_gradient
from dreamprm_dist.training.strategy import deepspeed_config
from dreamprm_dist.training.zero_state import Fragment, ZeroState

logger = logging.getLogger(__name__)

CHECKPOINT_TAG = "state"


@dataclass(frozen=True, kw_only=True)
class LowerStep:
    """A lower step as this rank saw it; tensors hold its part of the global batch in order.

    Attributes:
        lr: learning rate of the step.
        losses: unweighted instance losses before the step.
        weights: the weights they were multiplied with.
        gradient_norm: global norm of the averaged gradient before clipping.
        applied: False when a loss or the gradient was NaN or infinite on some rank: then the
            parameters moved on none.
        products: <grad l_i, v> before the step, if it was tapped.
    """

    lr: float
    losses: Tensor
    weights: Tensor
    products: Tensor | None
    gradient_norm: float
    applied: bool


class Engine:
    """A PRM whose optimizer state and gradients are sharded by ZeRO.

    Attributes:
        module: the PRM. Forward passes outside the lower step go through it and not through
            DeepSpeed, whose hooks expect every backward pass to be its own.
        parameters: the trained parameters by name.
        zero: the optimizer's state on this rank.
    """

    def __init__(
        self,
        prm: PRM,
        config: TrainConfig,
        num_steps: int,
        device: torch.device,
    ):
        self.device = device
        if device.type == "cpu":  # DeepSpeed would take a GPU that is there
            deepspeed.accelerator.set_accelerator(CPU_Accelerator())
        prm.train()  # dropout is removed at load; only activation checkpointing reads the mode
        parameters = [p for p in prm.parameters() if p.requires_grad]
        if not parameters:
            raise InputError("every parameter is frozen; unfreeze the vision tower or the model")
        buffers = {name: buffer.dtype for name, buffer in prm.named_buffers()}
        lower = config.lower
        optimizer = torch.optim.AdamW(
            parameters,
            lr=lower.lr,
            betas=(lower.momentum, 0.999),
            weight_decay=lower.weight_decay,
            fused=True,
        )
        schedule = build_schedule(
            lower.scheduler_type,
            optimizer,
            num_steps=num_steps,
            step_size=lower.scheduler_step_size,
            gamma=lower.scheduler_gamma,
        )
        settings = deepspeed_config(
            config, device, max(p.numel() for p in parameters), distributed.world_size()
        )
        stage = settings["zero_optimization"]["stage"]
        if stage == 1 and settings["bf16"]["enabled"] and lower.gradient_accumulation > 1:
            logger.warning(
                "zero1 adds up the gradients of %d micro-batches in bf16, which loses small ones; "
                "zero2 adds them in float32",
                lower.gradient_accumulation,
            )
        self._deepspeed, *_ = deepspeed.initialize(
            # Else it takes the GPU of LOCAL_RANK, and a rank that sees its own alone has only 0.
            args=SimpleNamespace(device_rank=device.index or 0),
            model=prm,
            optimizer=optimizer,
            lr_scheduler=schedule,
            model_parameters=parameters,
            config=settings,
            dist_init_required=False,
        )
        self._deepspeed.checkpoint_engine = CheckpointWriter()
        self.module: PRM = self._deepspeed.module
        # RoPE's frequencies in bf16 would turn far positions by whole radians.
        assert buffers == {name: buffer.dtype for name, buffer in self.module.named_buffers()}
        self.parameters = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        self.zero = ZeroState(self._deepspeed, list(self.parameters.values()))
        self._scope = self.module.parameters_in(config.hypergradient.hypergradient_scope)
        self._last_gradients: dict[Tensor, Tensor] | None = None
        hypergradient = config.hypergradient
        if hypergradient.preconditions and not hypergradient.estimator.in_lower_step:
            self._last_gradients = {}
            optimizer.register_step_pre_hook(self._keep_gradients)

    @property
    def lr(self) -> float:
        """Learning rate of the next lower step."""
        return self._deepspeed.optimizer.param_groups[0]["lr"]

    def lower_step(
        self,
        micro_batches: Sequence[Batch],
        losses_of: Callable[[StepOutput, Batch], Tensor],
        weigh: Callable[[StepOutput, Tensor, Batch], Tensor],
        tapping: Callable[[Batch], AbstractContextManager[TappedBatch]] | None = None,
    ) -> LowerStep:
        """One optimizer step on (1/G) sum_i w_i l_i over the global batch of G instances.

        Args:
            micro_batches: this rank's part, as many as the accumulation steps, of equal size.
            losses_of: what the PRM says and the batch to the instance losses (B,).
            weigh: what the PRM says, the losses (B,) and the batch to weights (B,).
            tapping: `Ghost.tapping` along some v, where the step is to give products.
        """
        all_losses, all_weights, products, lr = [], [], [], self.lr
        if self._last_gradients:
            self._last_gradients.clear()
        for batch in micro_batches:
            with tapping(batch) if tapping else nullcontext() as tapped:
                # DeepSpeed divides by accumulation steps and world size, the micro-batch mean by
                # B: together 1/G.
                output = self._deepspeed(batch)
                loss, losses, weights = lower_loss(output, batch, losses_of, weigh, tapped)
                # An infinite loss may have a finite gradient; NaN is what ZeRO sees.
                self._deepspeed.backward(loss * torch.where(loss.isfinite(), 1.0, torch.nan))
            self._deepspeed.step()
            all_losses.append(losses.detach())
            all_weights.append(weights.detach())
            if tapped:
                products.append(tapped.products)
        if not (applied := self._deepspeed.was_step_applied()):
            self.zero.drop_gradients()
        return LowerStep(
            lr=lr,
            losses=torch.cat(all_losses),
            weights=torch.cat(all_weights),
            products=torch.cat(products) if products else None,
            gradient_norm=float(self._deepspeed.get_global_grad_norm()),
            applied=applied,
        )

    def meta_gradient(
        self, micro_batches: Sequence[Batch], loss: Callable[[StepOutput, Batch], Tensor]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """v, the gradient of the meta loss, averaged over the global meta batch.

        Taken around DeepSpeed: ZeRO's state stays as it is.

        Args:
            micro_batches: this rank's part of the meta batch.
            loss: what the PRM says and the batch to losses (B,).

        Returns:
            v by name of the parameters in `hypergradient_scope`, the same on every rank, and this
            rank's losses.
        """
        size = torch.tensor(float(sum(map(len, micro_batches))), device=self.device)
        # Averaging over ranks divides by their number once more.
        scale = distributed.world_size() / distributed.all_reduce_sum(size)
        v, losses = meta_gradient(
            self.module, self.parameters, self._scope, micro_batches, loss, scale
        )
        distributed.all_reduce_mean(list(v.values()))
        return v, losses

    def precondition(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """v times the derivative of the lower level's Adam step, by each rank for its partition.

        It is that of the step just taken, at its gradient. Where v is taken before the step, it is
        that of the last one with the first moment for its gradient, so that it follows from the
        optimizer's state alone; v itself before the first one. A parameter that Adam has seen no
        gradient of yet, as of a new token, will be moved by its sign alone: there it is 0.
        """
        optimizer = self.zero.optimizer
        (settings,) = {(g["betas"], g["eps"]) for g in optimizer.param_groups}
        # Each is read once, for it may lie on the GPU.
        steps = {p: float(optimizer.state[p].get("step", 0)) for p in self.zero.partitions}
        product = {name: torch.zeros_like(tangent) for name, tangent in v.items()}
        for name, tangent in v.items():
            fragment = self.zero.fragment(self.parameters[name])
            if fragment is None:  # none of it lies in this rank's partition
                continue
            part = tangent.reshape(-1)[fragment.within]
            factor = self._adam_derivative(fragment, steps[fragment.partition], *settings)
            product[name].view(-1)[fragment.within] = part * factor.to(tangent.device)
        distributed.all_reduce_fragments(list(product.values()))
        return product

    def _adam_derivative(
        self, fragment: Fragment, step: float, betas: tuple[float, float], eps: float
    ) -> Tensor:
        state = self.zero.optimizer.state[fragment.partition]
        if self._last_gradients is None:
            if not step:
                return torch.ones(())
        elif fragment.partition not in self._last_gradients:  # the step was skipped
            return torch.zeros(())
        first, second = (state[name][fragment.place] for name in ("exp_avg", "exp_avg_sq"))
        if self._last_gradients is not None:
            gradient = self._last_gradients[fragment.partition][fragment.place]
            return adam_derivative(first, second, gradient, step, betas, eps)
        gradient = first / (1 - betas[0] ** step)
        factor = adam_derivative(first, second, gradient, step, betas, eps)
        return factor.masked_fill(second == 0, 0)

    def _keep_gradients(self, optimizer: torch.optim.Optimizer, *_) -> None:
        assert self._last_gradients is not None
        for group in optimizer.param_groups:
            self._last_gradients.update({p: p.grad for p in group["params"] if p.grad is not None})

    def save(self, folder: Path) -> None:
        """Write parameters, optimizer and schedule into a new folder; all ranks together.

        Raises:
            OSError: on the ranks that could not write, after all have tried.
        """
        writer = self._deepspeed.checkpoint_engine
        writer.error = None
        self._deepspeed.save_checkpoint(str(folder), tag=CHECKPOINT_TAG, save_latest=False)
        if writer.error is not None:
            raise OSError(str(writer.error)) from writer.error

    def load(self, folder: Path) -> None:
        """Put back what `save` wrote at this world size. The files are pickles: verify them first.

        Raises:
            InputError: DeepSpeed finds no checkpoint in the folder.
        """
        path, _ = self._deepspeed.load_checkpoint(str(folder), tag=CHECKPOINT_TAG)
        if path is None:
            raise InputError(f"{folder} holds no DeepSpeed checkpoint")
        self.zero.fit_loaded_optimizer()
        follow_schedule(self._deepspeed.lr_scheduler)

    def load_universal(self, folder: Path, scratch: Path) -> None:
        """Put back what `save` wrote at another world size; verify the files first, as for `load`.

        Args:
            scratch: a folder that all ranks see; made, and removed in the end.
        """
        if distributed.rank() == 0:
            make_universal(folder / CHECKPOINT_TAG, scratch / CHECKPOINT_TAG)
        distributed.barrier()
        with self.zero.loading_universal():
            self.load(scratch)
        distributed.barrier()
        if distributed.rank() == 0:
            shutil.rmtree(scratch)
