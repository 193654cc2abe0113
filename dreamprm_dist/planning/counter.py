"""Live tensors and FLOPs of a pass on the meta device, which are those of a real one.

Every storage that an operation makes is counted from there until nothing refers to it any more:
what PyTorch's allocator is asked for. What kernels take for themselves meanwhile is not seen.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

_SDPA = "scaled_dot_product_attention"
# By device, attention that never holds its scores.
_FLASH: dict[str, Any] = {
    "cpu": torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    "cuda": torch.ops.aten._scaled_dot_product_flash_attention,
}


# Torch's own counter (`FlopCounterMode`) watches modules by hooks that a backward pass within a
# backward pass, as of `ghost`, does not bear; these are its formulas, and the kernel that it lacks.
_FLOPS: dict[Any, Any] = flop_registry | {
    _FLASH["cpu"]: sdpa_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}


class Counter(TorchDispatchMode):
    """Counts while it is on.

    Attributes:
        live: bytes of all storages that were made while it was on, or noted, and still are.
        peak: the most of them since `restart`.
        flops: floating-point operations of products and convolutions since `restart`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.flops = 0
        # By id, which is that of one storage as long as it lives.
        self._storages: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.note(tree_leaves(result))
        if formula := _FLOPS.get(func._overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result

    def note(self, values: Iterable[object]) -> None:
        """Count the storages of tensors among some values, if they are new."""
        for value in values:
            if isinstance(value, Tensor) and value.layout == torch.strided:
                storage = value.untyped_storage()
                key, size = id(storage), storage.nbytes()
                if key not in self._storages:
                    self._storages[key] = weakref.finalize(storage, self._free, key, size)
                    self.live += size
        self.peak = max(self.peak, self.live)

    def _free(self, key: int, size: int) -> None:
        del self._storages[key]
        self.live -= size

    def restart(self) -> None:
        """Have `peak` start at what is live now, and `flops` at 0."""
        self.peak, self.flops = self.live, 0


@contextlib.contextmanager
def flash_attention(device: str) -> Iterator[None]:
    """Within the block torch's SDPA is the flash kernel of a device; the meta device has none.

    It is put in the function's place, for a mode would not reach what backward passes recompute.
    """
    kernel, functions = _FLASH[device], vars(F)
    sdpa = functions[_SDPA]

    def flash(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        if options.get("attn_mask") is not None:  # flash kernels take none
            return sdpa(query, key, value, **options)
        causal, scale = options.get("is_causal", False), options.get("scale")
        return kernel(query, key, value, 0.0, causal, scale=scale)[0]

    functions[_SDPA] = flash
    try:
        yield
    finally:
        functions[_SDPA] = sdpa
