"""The devices that tests run on: what a CPU can show too is seen on both."""

import pytest
import torch

CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    ],
)
DEVICES = ["cpu", CUDA]
only_cuda = pytest.mark.parametrize("device", [CUDA])
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")


def most_ranks() -> int:
    """As many as there are GPUs, up to the number of shards."""
    return max(n for n in (1, 2, 4) if n <= max(torch.cuda.device_count(), 1))
