"""ZeRO's state on this rank: the only user of DeepSpeed's private names.

What each of them means is asserted against DeepSpeed's public `safe_get_full_*` functions in
`tests/on_ranks/test_zero_state.py`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import deepspeed
import torch
from torch import Tensor

# DeepSpeed's shared-memory collectives for CPUs are compiled at the first start, want AVX, and hang
# when a rank dies; gloo does without all three.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

# What DeepSpeed counts of its steps.
COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


class Fragment(NamedTuple):
    """The part of a parameter that this rank's optimizer updates.

    Attributes:
        partition: the flat float32 tensor that the optimizer has as its parameter.
        place: where the part lies in it.
        within: where it lies in the parameter, flat.
    """

    partition: Tensor
    place: slice
    within: slice


class Snapshot(NamedTuple):
    """All that a lower step changes on one rank.

    Attributes:
        parameters: the PRM's trained parameters.
        partitions: their float32 copies, this rank's part.
        optimizer: moments and step counts of each partition; empty before the first step.
        schedule: state of the learning-rate schedule.
        lrs: learning rate of each parameter group.
        counters: by the names of `COUNTERS`.
    """

    parameters: list[Tensor]
    partitions: list[Tensor]
    optimizer: list[dict[str, Tensor]]
    schedule: dict[str, Any]
    lrs: list[float]
    counters: dict[str, int]


class ZeroState:
    """Float32 partitions, optimizer state, schedule and counters of a DeepSpeed engine.

    Args:
        engine: under ZeRO 1 or 2.
        parameters: those that it trains.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine, parameters: list[Tensor]):
        self._engine, self._parameters = engine, parameters
        self._zero = engine.optimizer
        # It puts a script into every checkpoint, on rank 0 alone, which must not fail alone.
        engine._copy_recovery_script = lambda save_path: None

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of this rank's partitions."""
        return self._zero.optimizer

    @property
    def partitions(self) -> list[Tensor]:
        """Its parameters: flat, float32, one per group."""
        return self._zero.single_partition_of_fp32_groups

    def fragment(self, parameter: Any) -> Fragment | None:
        """A parameter's part on this rank; None where it has none."""
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        partition = self.partitions[mapping.param_group_index]
        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
        return Fragment(
            partition,
            slice(here.start, here.start + here.numel),
            slice(there.start, there.start + there.numel),
        )

    def snapshot(self) -> Snapshot:
        """Copy all that a lower step changes on this rank."""
        return Snapshot(
            parameters=[p.detach().clone() for p in self._parameters],
            partitions=[p.detach().clone() for p in self.partitions],
            optimizer=[{k: t.clone() for k, t in state.items()} for state in self._states()],
            schedule=copy.deepcopy(self._engine.lr_scheduler.state_dict()),
            lrs=[group["lr"] for group in self._zero.param_groups],
            counters={name: getattr(self._engine, name) for name in COUNTERS},
        )

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot, bit for bit."""
        torch._foreach_copy_(self._parameters, snapshot.parameters)
        torch._foreach_copy_(self.partitions, snapshot.partitions)
        for state, saved in zip(self._states(), snapshot.optimizer, strict=True):
            for key, tensor in state.items():
                # The first step makes the state; a state of zeros is where it began.
                tensor.copy_(saved[key]) if saved else tensor.zero_()
        self._engine.lr_scheduler.load_state_dict(copy.deepcopy(snapshot.schedule))
        for group, lr in zip(self._zero.param_groups, snapshot.lrs, strict=True):
            group["lr"] = lr
        for name, value in snapshot.counters.items():
            setattr(self._engine, name, value)

    def drop_gradients(self) -> None:
        """Have the next step add to nothing of a skipped one.

        With offload DeepSpeed keeps what it adds up in float32, NaN and all.
        """
        self._zero.averaged_gradients.clear()

    def fit_loaded_optimizer(self) -> None:
        """Have the optimizer step as it was built to, whatever the one in the checkpoint did.

        DeepSpeed leaves the count of steps of a universal checkpoint on the CPU, where a fused step
        on the GPU cannot read it.
        """
        for group, state in zip(self.optimizer.param_groups, self._states(), strict=True):
            group["fused"] = self.optimizer.defaults["fused"]
            if state:
                state["step"] = state["step"].to(state["exp_avg"].device)

    def _states(self) -> list[dict[str, Tensor]]:
        return [self.optimizer.state[p] for p in self.partitions]

    @contextlib.contextmanager
    def loading_universal(self) -> Iterator[None]:
        """Have `load_checkpoint` read a universal checkpoint within the block."""
        settings = self._engine._config
        settings.load_universal_checkpoint = True
        try:
            yield
        finally:
            settings.load_universal_checkpoint = False
