"""What ZeRO holds on a rank's device, as tensors on the meta device that come and go as it does.

It follows DeepSpeed's `runtime/zero/stage_1_and_2.py`; tests hold it against real runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def on_meta(elements: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A flat tensor without values."""
    return torch.empty(elements, dtype=dtype, device="meta")


class PlannedZero:
    """ZeRO's tensors on the last rank, whose gradients come first in a backward pass.

    Args:
        parameters: the trained ones, in the optimizer's order.
        settings: from `deepspeed_config`.
        world_size: number of ranks.
        keeps_gradient: the engine keeps the gradient of the last step, for `precondition`.

    Attributes:
        partition_size: elements whose optimizer state is this rank's.
        largest_part: the most of one parameter among them.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        settings: Mapping[str, Any],
        world_size: int,
        keeps_gradient: bool,
    ):
        zero = settings["zero_optimization"]
        self._contiguous = zero["contiguous_gradients"]
        self._buffers = 2 if zero["overlap_comm"] else 1
        self._bucket_size = int(zero["reduce_bucket_size"])
        self._keeps_others = zero["stage"] == 1
        self._offloads = "offload_optimizer" in zero
        self._parameters = parameters
        self._keeps_gradient = keeps_gradient
        self._last_gradient: Tensor | None = None
        self._dtype = parameters[0].dtype
        widened = settings.get("data_types", {}).get("grad_accum_dtype") == "fp32"
        self._accumulates_wide = widened and self._dtype != torch.float32
        self.partition_size = -(-sum(p.numel() for p in parameters) // (2 * world_size)) * 2
        self._own = self._parts(self.partition_size * (world_size - 1))
        self.largest_part = max(self._own.values(), default=0)
        self._gradient: dict[Tensor | None, Tensor] = {}  # of the partition: whole, or by parameter
        self._buckets: list[Tensor] = []
        # Master copy and moments; offloaded, what gradients are copied through.
        largest = max(p.numel() for p in parameters)
        self._state = (
            [on_meta(largest, self._dtype)]
            if self._offloads
            else [on_meta(self.partition_size) for _ in range(3)]
        )

    def _parts(self, start: int) -> dict[Tensor, int]:
        """Elements of each parameter that lie in the partition which begins at `start`."""
        parts, place = {}, 0
        for p in self._parameters:
            end = place + p.numel()
            if (size := min(end, start + self.partition_size) - max(place, start)) > 0:
                parts[p] = size
            place = end
        return parts

    @contextlib.contextmanager
    def backward(self, last: bool) -> Iterator[None]:
        """Reduce and drop the gradients of a backward pass within the block as ZeRO does.

        Args:
            last: of a step's micro-batches.
        """
        self._last_gradient = None
        bucket = _Bucket(self, reduces=last or not self._keeps_others)
        hooks = [p.register_post_accumulate_grad_hook(bucket.take) for p in self._parameters]
        try:
            yield
            bucket.reduce()
        finally:
            for hook in hooks:
                hook.remove()
        # Those of an earlier micro-batch have been added to.
        self._gradient = self._gradient or bucket.kept
        if self._keeps_others:  # as views of the buckets, once they are reduced
            self._buckets = bucket.buffers if last else []
        else:
            self._drop_gradients()

    def step(self) -> None:
        """A fused optimizer step: its temporary tensors, and no gradient in the end."""
        if not self._offloads:
            on_meta(self.largest_part, torch.float64)  # for the norm
            flat = self._gradient.get(None)
            if flat is None:
                narrow = on_meta(self.partition_size, self._dtype)
                flat = narrow.to(torch.float32)
                del narrow
            self._gradient = {}
            if self._keeps_gradient:
                self._last_gradient = flat
        self._gradient, self._buckets = {}, []
        self._drop_gradients()

    def _drop_gradients(self) -> None:
        for p in self._parameters:
            p.grad = None


class _Bucket:
    """The gradients of one backward pass on their way.

    Attributes:
        kept: those of this rank's partition, by parameter, where they are not added up in float32.
        buffers: where gradients are copied to for their reduction, if to any.
    """

    def __init__(self, zero: PlannedZero, reduces: bool):
        self.kept: dict[Tensor | None, Tensor] = {}
        self.buffers: list[Tensor] = []
        self._zero, self._reduces = zero, reduces
        self._waiting: list[Tensor] = []
        self._elements = 0

    def take(self, parameter: Tensor) -> None:
        zero = self._zero
        if zero._contiguous and not self.buffers:
            sizes = [zero._bucket_size] * zero._buffers
            self.buffers = [on_meta(size, zero._dtype) for size in sizes]
        if not self._reduces:
            return
        if self._elements + parameter.numel() > zero._bucket_size:
            self.reduce()
        self._waiting.append(parameter)
        self._elements += parameter.numel()
        if zero._contiguous:
            parameter.grad = None  # it lies in the bucket now

    def reduce(self) -> None:
        zero = self._zero
        flat = on_meta(self._elements, zero._dtype)
        for parameter in self._waiting:
            own = zero._own.get(parameter)
            if own and zero._accumulates_wide:
                if None not in zero._gradient:
                    zero._gradient[None] = on_meta(zero.partition_size)
                on_meta(own)  # its part in float32, which is added there
            elif own and zero._offloads:
                on_meta(own, torch.float64)  # for the norm, before it goes to the CPU
                parameter.grad = None
            elif own and zero._contiguous:
                if not self.kept:  # in one piece, of all parameters that have a part here
                    size = sum(p.numel() for p in zero._own)
                    self.kept[parameter] = on_meta(size, zero._dtype)
            elif own:
                assert parameter.grad is not None
                self.kept[parameter] = parameter.grad
            else:
                parameter.grad = None
        del flat
        self._waiting.clear()
        self._elements = 0
