"""GPU types as a plan knows them."""

from __future__ import annotations

from typing import NamedTuple


class Gpu(NamedTuple):
    """A GPU.

    Attributes:
        gib: memory that CUDA shows of it, in GiB.
        tflops: peak of dense products by precision, in TFLOP/s, as its maker says; those in float32
            are without tensor cores.
    """

    gib: float
    tflops: dict[str, float]


GPUS = {
    "a100-40": Gpu(39.4, {"bf16": 312, "fp32": 19.5}),
    "a100-80": Gpu(79.2, {"bf16": 312, "fp32": 19.5}),
    "h100-80": Gpu(79.2, {"bf16": 989, "fp32": 67}),
    "h200-141": Gpu(139.8, {"bf16": 989, "fp32": 67}),
    "b200-180": Gpu(178.4, {"bf16": 2250, "fp32": 75}),
    "l40s-48": Gpu(44.4, {"bf16": 362, "fp32": 91.6}),
    "rtx4090-24": Gpu(23.5, {"bf16": 165, "fp32": 82.6}),
}
# What a run may fill of it: the rest is for CUDA, NCCL and what the allocator cannot use.
USABLE = 0.9
