"""A plan: whether a run fits its GPUs, how long it takes, and what would make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar

import torch

from dreamprm_dist.flags import AtLeastOne, Count, FlagGroup, Positive, flag
from dreamprm_dist.planning.gpus import GPUS, USABLE
from dreamprm_dist.planning.iteration import Counted, count_iteration
from dreamprm_dist.planning.workload import Workload
from dreamprm_dist.training.config import BATCH_FLAGS, TrainConfig
from dreamprm_dist.training.strategy import resolved_strategy

GIB = 2**30


@dataclass
class PlanConfig(FlagGroup):
    """What a run is planned for."""

    _argument_group_name: ClassVar[str] = "plan"

    num_gpus: AtLeastOne = flag(8, "GPUs, one rank each.")
    gpu: str = flag("h100-80", "Type of the GPUs.", choices=GPUS)
    utilisation: Positive = flag(
        0.4, "Part of the GPUs' peak that products reach; make bench-gpu measures it."
    )
    tiles: Count | None = flag(
        None, "Tiles of an instance (default: from the shards, or those of a large image)."
    )
    text_tokens: AtLeastOne | None = flag(
        None, "Tokens of an instance beside those of its image (default: from the shards, or 600)."
    )
    steps: AtLeastOne | None = flag(
        None, "Scored steps of an instance (default: from the shards, or 8)."
    )


class Plan:
    """A run as it would be.

    Args:
        train: the run.
        config: what it is planned for.
        largest, mean: instances of its data.

    Attributes:
        counted: an iteration on one rank, of instances that are all like the largest.
        seconds: of each phase of an iteration of mean instances, without waiting for data or the
            network.
    """

    def __init__(self, train: TrainConfig, config: PlanConfig, largest: Workload, mean: Workload):
        self.train, self.config, self.largest, self.mean = train, config, largest, mean
        self._counts: dict[str, Counted] = {}  # by the run's settings, written out
        self.counted = self._count(train)
        usual = self.counted
        if mean != largest:
            usual = count_iteration(train, mean, config.num_gpus)
        self.tflops = GPUS[config.gpu].tflops[train.model.precision]
        rate = self.tflops * 1e12 * config.utilisation
        self.seconds = {phase: flops / rate for phase, flops in usual.flops.items() if flops}

    def _count(self, train: TrainConfig) -> Counted:
        settings = repr(train)
        if settings not in self._counts:
            counted = count_iteration(train, self.largest, self.config.num_gpus)
            self._counts[settings] = counted
        return self._counts[settings]

    @property
    def usable(self) -> float:
        """Bytes of a GPU's memory that may be filled."""
        return USABLE * GPUS[self.config.gpu].gib * GIB

    @property
    def fits(self) -> bool:
        return self.counted.peak <= self.usable

    def remedy(self) -> tuple[dict[str, Any], int] | None:
        """The flags that make it fit at the least cost, with the peak then; None if none do.

        The global batches stay as they are.
        """
        before = self.train.as_dict()
        for variant in _variants(self.train):
            batches = list(_smaller_batches(variant))
            if self._count(batches[-1]).peak > self.usable:
                batches = batches[:1]  # none in between will do
            for train in batches:
                if (peak := self._count(train).peak) <= self.usable:
                    return {k: v for k, v in train.as_dict().items() if v != before[k]}, peak
        return None

    def text(self) -> str:
        """What a person wants to know of it."""
        train, config, counted = self.train, self.config, self.counted
        sizes = train.global_batch_sizes(config.num_gpus)
        batches = ", ".join(f"global {name} {size}" for name, size in sizes.items())
        lines = [
            f"{counted.parameters / 1e6:,.0f} M parameters, "
            f"{counted.trained / 1e6:,.0f} M trained, {train.model.precision}",
            f"{train.kind} on {config.num_gpus} x {config.gpu}, "
            f"{resolved_strategy(train.run.strategy, torch.device('cuda'))}: {batches}, "
            f"{train.upper.unroll_steps} lower step(s) per iteration",
            f"memory for instances of {self.largest.described}",
        ]
        if self.mean != self.largest:
            lines.append(f"time for instances of {self.mean.described}")
        lines += ["", f"{'phase':<15}{'memory':>11}{'TFLOP':>9}{'seconds':>9}"]
        for phase, peak in {"between": counted.between, **counted.peaks}.items():
            line = f"{phase:<15}{peak / GIB:>7.1f} GiB"
            if phase in self.seconds:
                line += f"{self.seconds[phase] * self.tflops * config.utilisation:>9.1f}"
                line += f"{self.seconds[phase]:>9.2f}"
            lines.append(line)
        total = sum(self.seconds.values())
        duration = timedelta(seconds=round(total * train.run.iteration_num))
        return "\n".join(
            [
                *lines,
                "",
                self._verdict(),
                f"collectives: {counted.sent / 1e9:.1f} GB per iteration and rank",
                f"time: {train.run.iteration_num:,} iterations x {total:.3g} s = {duration} at "
                f"{config.utilisation:.0%} of {self.tflops:g} TFLOP/s",
            ]
        )

    def _verdict(self) -> str:
        room = f"{self.counted.peak / GIB:.1f} GiB, where {self.usable / GIB:.1f} may be filled"
        if self.fits:
            return f"fits: {room}"
        if (remedy := self.remedy()) is None:
            return f"does not fit: {room}; no flag makes it fit: take larger GPUs, or more of them"
        flags, peak = remedy
        named = " ".join(f"--{k}" + ("" if v is True else f" {v}") for k, v in flags.items())
        return f"does not fit: {room}; it fits with {named}: {peak / GIB:.1f} GiB"


def _variants(train: TrainConfig) -> Iterator[TrainConfig]:
    """The run, and it with ever more that saves memory: at the cost of time, then of more."""
    yield train
    if train.run.strategy == "zero1":
        train = train.with_flags({"strategy": "zero2"})
        yield train
    for flags in (
        {"gradient_checkpointing": True},
        {"strategy": "zero2_offload"},
        {"hypergradient_scope": "language_model"},
        {"freeze_vision_tower": True},
    ):
        train = train.with_flags(flags)
        yield train


def _smaller_batches(train: TrainConfig) -> Iterator[TrainConfig]:
    """The run with micro-batches halved again and again, and as many more of them."""
    yield train
    values = train.as_dict()
    flags: dict[str, int] = {}
    for size, accumulation in BATCH_FLAGS.items():
        if values[size] % 2 == 0:
            flags |= {size: values[size] // 2, accumulation: values[accumulation] * 2}
    if flags:
        yield from _smaller_batches(train.with_flags(flags))
