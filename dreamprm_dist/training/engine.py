"""The PRM under DeepSpeed ZeRO: build, lower step, meta gradient."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import deepspeed
import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch import Tensor
from torch.func import functional_call

from dreamprm_dist import distributed
from dreamprm_dist.errors import InputError
from dreamprm_dist.hypergradient.sama import adam_derivative
from dreamprm_dist.hypergradient.tap import TappedBatch
from dreamprm_dist.losses import instance_losses
from dreamprm_dist.prm.batch import Batch
from dreamprm_dist.prm.model import PRM, StepOutput
from dreamprm_dist.reweighters.schedules import build_schedule, follow_schedule
from dreamprm_dist.training.config import TrainConfig
from dreamprm_dist.training.engine_files import CheckpointWriter, make_universal
from dreamprm_dist.training.zero_state import Fragment, ZeroState

CHECKPOINT_TAG = "state"
DS_CONFIGS = resources.files("dreamprm_dist") / "ds_configs"
if not DS_CONFIGS.is_dir():  # a checkout has it beside the package, where users edit it
    DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"


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
        lower = config.lower
        optimizer = torch.optim.AdamW(
            parameters,
            lr=lower.lr,
            betas=(lower.momentum, 0.999),
            weight_decay=lower.weight_decay,
        )
        schedule = build_schedule(
            lower.scheduler_type,
            optimizer,
            num_steps=num_steps,
            step_size=lower.scheduler_step_size,
            gamma=lower.scheduler_gamma,
        )
        self._deepspeed, *_ = deepspeed.initialize(
            model=prm,
            optimizer=optimizer,
            lr_scheduler=schedule,
            model_parameters=parameters,
            config=deepspeed_config(config, device, max(p.numel() for p in parameters)),
            dist_init_required=False,
        )
        self._deepspeed.checkpoint_engine = CheckpointWriter()
        self.module: PRM = self._deepspeed.module
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
        weigh: Callable[[StepOutput, Tensor, Batch], Tensor],
        tapping: Callable[[Batch], AbstractContextManager[TappedBatch]] | None = None,
    ) -> LowerStep:
        """One optimizer step on (1/G) sum_i w_i l_i over the global batch of G instances.

        Args:
            micro_batches: this rank's part, as many as the accumulation steps, of equal size.
            weigh: what the PRM says, the losses (B,) and the batch to weights (B,).
            tapping: `Ghost.tapping` along some v, where the step is to give products.
        """
        all_losses, all_weights, products, lr = [], [], [], self.lr
        if self._last_gradients:
            self._last_gradients.clear()
        for batch in micro_batches:
            with tapping(batch) if tapping else nullcontext() as tapped:
                output = self._deepspeed(batch)
                losses = instance_losses(
                    output.logits, batch.step_targets, batch.step_rows, len(batch)
                )
                weights = weigh(output, losses, batch)
                weighted = tapped.weigh_in_backward(losses, weights) if tapped else weights * losses
                # DeepSpeed divides by accumulation steps and world size, the micro-batch mean by
                # B: together 1/G.
                loss = weighted.mean()
                # An infinite loss may have a finite gradient; NaN is what ZeRO sees.
                self._deepspeed.backward(loss * torch.where(loss.isfinite(), 1.0, torch.nan))
            self._deepspeed.step()
            all_losses.append(losses.detach())
            all_weights.append(weights.detach())
            if tapped:
                products.append(tapped.products)
        return LowerStep(
            lr=lr,
            losses=torch.cat(all_losses),
            weights=torch.cat(all_weights),
            products=torch.cat(products) if products else None,
            gradient_norm=float(self._deepspeed.get_global_grad_norm()),
            applied=self._deepspeed.was_step_applied(),
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
        parameters = [self.parameters[name] for name in self._scope]
        # What lies outside the scope is held constant, and so records nothing to go back through.
        constants = {
            name: p.detach() for name, p in self.parameters.items() if name not in self._scope
        }
        size = torch.tensor(float(sum(map(len, micro_batches))), device=self.device)
        # Averaging over ranks divides by their number once more.
        scale = distributed.world_size() / distributed.all_reduce_sum(size)
        total: list[Tensor] | None = None
        all_losses = []
        for batch in micro_batches:
            output = functional_call(self.module, constants, (batch,))
            losses = loss(output, batch)
            gradients = unalias(
                torch.autograd.grad(losses.sum() * scale, parameters, materialize_grads=True)
            )
            all_losses.append(losses.detach())
            if total is None:
                total = [g if len(micro_batches) == 1 else g.float() for g in gradients]
            else:
                torch._foreach_add_(total, [g.float() for g in gradients])
        assert total is not None
        v = [t.to(p.dtype) for t, p in zip(total, parameters, strict=True)]
        distributed.all_reduce_mean(v)
        return dict(zip(self._scope, v, strict=True)), torch.cat(all_losses)

    def precondition(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """v times the derivative of the lower level's Adam step, by each rank for its partition.

        It is that of the step just taken, at its gradient. Where v is taken before the step, it is
        that of the last one with the first moment for its gradient, so that it follows from the
        optimizer's state alone; v itself before the first one. A parameter that Adam has seen no
        gradient of yet, as of a new token, will be moved by its sign alone: there it is 0.
        """
        optimizer = self.zero.optimizer
        (settings,) = {(g["betas"], g["eps"]) for g in optimizer.param_groups}
        product = {name: torch.zeros_like(tangent) for name, tangent in v.items()}
        for name, tangent in v.items():
            fragment = self.zero.fragment(self.parameters[name])
            if fragment is None:  # none of it lies in this rank's partition
                continue
            part = tangent.reshape(-1)[fragment.within]
            factor = self._adam_derivative(fragment, *settings)
            product[name].view(-1)[fragment.within] = part * factor.to(tangent.device)
        distributed.all_reduce_fragments(list(product.values()))
        return product

    def _adam_derivative(
        self, fragment: Fragment, betas: tuple[float, float], eps: float
    ) -> Tensor:
        state = self.zero.optimizer.state[fragment.partition]
        step = float(state.get("step", 0))
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


def unalias(gradients: Sequence[Tensor]) -> list[Tensor]:
    """The same gradients, none in the memory of another, so that each may be changed in place.

    Autograd returns views of one tensor where parameters have one gradient, as the class token and
    its position embedding when the batch has a single tile.
    """
    seen, apart = set(), []
    for gradient in gradients:
        storage = gradient.untyped_storage().data_ptr()
        apart.append(gradient.clone() if storage in seen else gradient)
        seen.add(storage)
    return apart


def deepspeed_config(config: TrainConfig, device: torch.device, largest: int) -> dict:
    """The JSON of `--strategy` with what the configuration owns written into it.

    Args:
        largest: elements of the largest trained parameter.

    Raises:
        InputError: the JSON sets a value that the configuration owns to something else.
    """
    strategy = config.run.strategy
    if strategy == "default":
        strategy = "zero2" if device.type == "cuda" else "zero2_cpu"
    file = DS_CONFIGS / f"{strategy}.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    lower = config.lower
    owned = {
        "train_micro_batch_size_per_gpu": lower.batch_size,
        "gradient_accumulation_steps": lower.gradient_accumulation,
        "train_batch_size": lower.batch_size
        * lower.gradient_accumulation
        * distributed.world_size(),
        "gradient_clipping": lower.gradient_clipping,
        "bf16": {"enabled": config.model.precision == "bf16"},
        "fp16": {"enabled": False},
    }
    for key, value in owned.items():
        if settings.get(key, value) not in (value, "auto"):
            raise InputError(
                f"{file}: {key} is {settings[key]}, but the configuration says {value}; leave it "
                "out of the file"
            )
    for key in ("optimizer", "scheduler"):
        if key in settings:
            raise InputError(f"{file}: {key} belongs to the configuration; leave it out")
    zero = settings["zero_optimization"]
    if zero.get("overlap_comm"):
        # The gradient of a parameter that is larger than the bucket DeepSpeed reduces on a stream
        # of its own, and gives its memory away meanwhile.
        zero["reduce_bucket_size"] = max(zero.get("reduce_bucket_size", 0), largest)
    return settings | owned
