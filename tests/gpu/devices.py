"""The devices that tests run on: what a CPU can show too is seen on both."""

import pytest
import torch

on_gpu = pytest.mark.gpu
has_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
CUDA = pytest.param("cuda", marks=[on_gpu, has_gpu])
DEVICES = ["cpu", CUDA]


def most_ranks() -> int:
    """As many as there are GPUs, up to the number of shards."""
    return max(n for n in (1, 2, 4) if n <= max(torch.cuda.device_count(), 1))
