"""What is written into the file of a `--strategy`."""

import pytest
import torch

from dreamprm_dist.training.config import parse_train_config
from dreamprm_dist.training.strategy import deepspeed_config

INTERNVL3_1B_HEAD = 151_674 * 896


@pytest.mark.parametrize("name", ["zero1", "zero2"])
def test_zeros_bucket_holds_the_largest_parameter(name: str) -> None:
    """DeepSpeed reduces a larger one on its own stream without keeping its memory meanwhile."""
    config = parse_train_config(["--strategy", name])

    def bucket(largest: int) -> int:
        zero = deepspeed_config(config, torch.device("cpu"), largest, 1)["zero_optimization"]
        assert zero["overlap_comm"]
        return zero["reduce_bucket_size"]

    assert bucket(INTERNVL3_1B_HEAD) >= INTERNVL3_1B_HEAD > bucket(1000) > 1000
