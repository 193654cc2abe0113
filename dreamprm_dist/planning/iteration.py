"""An outer iteration counted on the meta device: memory and FLOPs of each phase.

The passes are those that training runs, `training/passes.py`; what DeepSpeed holds around them is
`PlannedZero`'s.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from dreamprm_dist import distributed
from dreamprm_dist.hypergradient.ghost import Ghost
from dreamprm_dist.hypergradient.sama import adam_derivative
from dreamprm_dist.losses import instance_losses, step_scores
from dreamprm_dist.planning.counter import Counter, flash_attention
from dreamprm_dist.planning.workload import Workload
from dreamprm_dist.planning.zero import PlannedZero, on_meta
from dreamprm_dist.prm.batch import Batch
from dreamprm_dist.prm.model import StepOutput, load_shapes
from dreamprm_dist.reweighters import REWEIGHTERS
from dreamprm_dist.reweighters.config import ReweighterConfig
from dreamprm_dist.reweighters.features import FEATURES
from dreamprm_dist.reweighters.instance_net import mlp
from dreamprm_dist.training.config import TrainConfig
from dreamprm_dist.training.passes import directional_derivative, lower_loss, meta_gradient
from dreamprm_dist.training.strategy import deepspeed_config

LABELS = {"+": 0, "-": 1}  # any two tokens


@dataclass
class Counted:
    """What an iteration takes on a rank.

    Attributes:
        parameters, trained: elements of the PRM.
        between: bytes of live tensors between two iterations.
        peaks: the most bytes of live tensors in each phase: lower, optimizer, meta,
            hypergradient, export.
        flops: floating-point operations of each phase of an iteration, by torch's formulas.
        sent: bytes handed to collectives.
    """

    parameters: int = 0
    trained: int = 0
    between: int = 0
    peaks: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    flops: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    sent: int = 0

    @property
    def peak(self) -> int:
        """The most bytes of live tensors of all phases."""
        return max(self.peaks.values())


def count_iteration(
    config: TrainConfig, workload: Workload, world_size: int, device: str = "cuda"
) -> Counted:
    """Count an iteration of a run.

    Args:
        workload: of every instance, training and meta.
        device: cuda or cpu, which decides the attention kernel and the strategy's default.

    Raises:
        InputError: no such model, or no such run of it.
    """
    with torch.random.fork_rng(devices=[]):
        return _Counter(config, workload, world_size, device).count()


def sent_bytes(config: TrainConfig, stage: int, trained: int, in_scope: int, net: int) -> int:
    """Bytes that an iteration hands to collectives on a rank, but for some counts and norms.

    Args:
        stage: of ZeRO.
        trained, in_scope: bytes of the trained parameters, and of those that v covers.
        net: bytes of the reweighter's hypergradient that is summed over ranks.
    """
    upper, lower = config.upper, config.lower
    # ZeRO reduces the gradients of each micro-batch, or at stage 1 of all, and gathers parameters.
    reductions = 1 if stage == 1 else lower.gradient_accumulation
    steps = upper.unroll_steps * (2 if upper.rollback and config.learns else 1)
    total = steps * (reductions + 1) * trained
    if config.learns:
        several = upper.unroll_window == "all" and not config.hypergradient.estimator.in_lower_step
        taken = upper.unroll_steps if several else 1
        total += taken * in_scope * (2 if config.hypergradient.preconditions else 1) + net
    return total


class _Counter:
    def __init__(self, config: TrainConfig, workload: Workload, world_size: int, device: str):
        self._config, self._workload = config, workload
        self._world_size, self._device = world_size, device
        self._counter, self._counted = Counter(), Counted()

    def count(self) -> Counted:
        config, counted = self._config, self._counted
        prm = load_shapes(config.model.reward_model, config.model.precision)
        prm.freeze(config.model.freeze_vision_tower, config.model.freeze_language_model)
        if config.model.gradient_checkpointing:
            prm.checkpoint_activations()
        if not self._workload.tiles:
            prm.see_no_images()
        self._prm = prm.train()
        self._trained = {n: p for n, p in prm.named_parameters() if p.requires_grad}
        self._scope = prm.parameters_in(config.hypergradient.hypergradient_scope)
        counted.parameters = sum(p.numel() for p in prm.parameters())
        counted.trained = sum(p.numel() for p in self._trained.values())
        ghost = config.learns and config.hypergradient.estimator.in_lower_step
        self._ghost = Ghost(prm) if ghost else None
        with flash_attention(self._device), self._counter:
            self._counter.note([*prm.parameters(), *prm.buffers()])
            parameters = list(self._trained.values())
            settings = deepspeed_config(
                config,
                torch.device(self._device),
                max(p.numel() for p in parameters),
                self._world_size,
            )
            keeps = config.hypergradient.preconditions and not ghost
            self._zero = PlannedZero(parameters, settings, self._world_size, keeps)
            counted.between = self._counter.live
            self._iterate()
            self._export()
        sizes = {name: p.nbytes for name, p in self._trained.items()}
        if self._world_size > 1:
            counted.sent = sent_bytes(
                config,
                settings["zero_optimization"]["stage"],
                sum(sizes.values()),
                sum(sizes[name] for name in self._scope),
                net_bytes(config.reweighter, prm.hidden_size),
            )
        return counted

    @contextmanager
    def _phase(self, name: str, times: int | Fraction = 1) -> Iterator[None]:
        """Count what is done in the block to a phase, its FLOPs so many times."""
        self._counter.restart()
        yield
        self._counted.peaks[name] = max(self._counted.peaks[name], self._counter.peak)
        self._counted.flops[name] += int(times * self._counter.flops)

    def _iterate(self) -> None:
        lower, upper = self._config.lower, self._config.upper
        window = [
            [self._batch(lower.batch_size) for _ in range(lower.gradient_accumulation)]
            for _ in range(upper.unroll_steps)
        ]
        if not self._config.learns:
            return self._lower_step(window[0], upper.unroll_steps)
        meta = [
            self._batch(upper.meta_batch_size, meta=True)
            for _ in range(upper.meta_gradient_accumulation)
        ]
        before = self._snapshot() if upper.rollback else None
        learning = upper.unroll_steps if upper.unroll_window == "all" else 1
        if self._ghost:
            v = self._meta_gradient(meta, 1)
            if silent := upper.unroll_steps - learning:
                self._lower_step(window[0], silent)
            self._lower_step(window[0], learning, v)
        else:
            v = None
            for times in [1, learning - 1] if learning > 1 else [1]:  # later ones hold a v before
                self._lower_step(window[0], times if learning > 1 else upper.unroll_steps)
                v = self._meta_gradient(meta, times)
                self._derive(window[0], v, times)
        if before is not None:
            self._lower_step(window[0], upper.unroll_steps)
        return None

    def _batch(self, size: int, meta: bool = False) -> Batch:
        sharing = 4 if meta and self._config.upper.group_meta_by_question else 1
        return self._workload.batch(self._prm, size, sharing)

    def _lower_losses(self, output: StepOutput, batch: Batch) -> Tensor:
        return instance_losses(output.logits, batch, self._config.lower_loss, LABELS)

    def _lower_step(
        self, micro_batches: list[Batch], times: int, v: Mapping[str, Tensor] | None = None
    ) -> None:
        def ones(output: StepOutput, losses: Tensor, batch: Batch) -> Tensor:
            return torch.ones_like(losses)

        # The last adds to the first; those in between are like it.
        shares = [1, len(micro_batches) - 1] if len(micro_batches) > 1 else [1]
        for position, of in enumerate(shares):
            batch, last = micro_batches[position], position == len(shares) - 1
            tapping = self._ghost.tapping(batch, v) if self._ghost and v else nullcontext()
            with self._phase("lower", times * of), tapping as tapped:
                loss, *_ = lower_loss(self._prm(batch), batch, self._lower_losses, ones, tapped)
                with self._zero.backward(last):
                    loss.backward()
            del loss
        with self._phase("optimizer"):
            self._zero.step()

    def _meta_gradient(self, micro_batches: list[Batch], times: int) -> dict[str, Tensor]:
        config = self._config.meta_loss
        signs: list[Literal["+", "-"]] = ["+"] if config.loss_target == "+" else ["+", "-"]

        def loss(output: StepOutput, batch: Batch) -> Tensor:
            scores = [step_scores(output.logits, LABELS, s, config.score_over) for s in signs]
            # How some numbers are aggregated is of no weight, and depends on their values.
            zeros = torch.zeros_like(batch.true_false)
            return zeros.index_add(0, batch.step_rows, torch.stack(scores).sum(0))

        count = min(len(micro_batches), 2)
        with self._phase("meta", Fraction(times * len(micro_batches), count)):
            v, _ = meta_gradient(
                self._prm, self._trained, self._scope, micro_batches[:count], loss, 1.0
            )
            self._all_reduce(v)
            if self._config.hypergradient.preconditions:
                v = self._precondition(v)
        return v

    def _all_reduce(self, v: Mapping[str, Tensor]) -> None:
        if self._world_size > 1:
            for bucket in distributed.buckets(v.values()):
                on_meta(sum(t.numel() for t in bucket), bucket[0].dtype)

    def _precondition(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        product = {name: torch.empty_like(tangent) for name, tangent in v.items()}
        moment = on_meta(self._zero.largest_part)
        adam_derivative(moment, moment, moment, 1.0, (0.9, 0.999), 1e-8)
        self._all_reduce(product)
        return product

    def _derive(self, micro_batches: list[Batch], v: Mapping[str, Tensor], times: int) -> None:
        estimator = self._config.hypergradient.estimator
        with self._phase("hypergradient", times * len(micro_batches)):
            directional_derivative(
                self._prm,
                estimator,
                self._trained,
                v,
                micro_batches[0],
                self._lower_losses,
                lambda output, losses, batch: losses.new_zeros(0, 0),
            )

    def _snapshot(self) -> list[Tensor]:
        copies = [torch.empty_like(p) for p in self._trained.values()]
        return copies + [on_meta(self._zero.partition_size) for _ in range(3)]

    @torch.no_grad()
    def _export(self) -> None:
        config = self._config
        reads_prm = REWEIGHTERS[config.reweighter.reweighter].reads_prm
        with self._phase("export", times=0):  # it is no part of an iteration
            # For the weights, or the losses, of all instances.
            if (config.learns and reads_prm) or config.run.export_losses:
                self._prm(self._batch(config.lower.batch_size))


def net_bytes(config: ReweighterConfig, hidden_size: int) -> int:
    """Bytes of the hypergradient that is summed over ranks: a table's stays on its rank."""
    if config.reweighter != "instance_net":
        return 0
    width = FEATURES[config.instance_net_input].width(hidden_size)
    net = mlp(width, config.hidden_dim, config.num_layers)
    return sum(p.nbytes for p in net.parameters())
