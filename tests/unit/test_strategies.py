"""What is written into the file of a `--strategy`."""

import pytest
import torch

from dreamprm_dist import distributed
from dreamprm_dist.training.config import parse_train_config
from dreamprm_dist.training.engine import deepspeed_config

INTERNVL3_1B_HEAD = 151_674 * 896


@pytest.mark.parametrize("name", ["zero1", "zero2"])
def test_zeros_bucket_holds_the_largest_parameter(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed reduces a larger one on its own stream without keeping its memory meanwhile."""
    monkeypatch.setattr(distributed, "world_size", lambda: 1)
    config = parse_train_config(["--strategy", name])

    def bucket(largest: int) -> int:
        zero = deepspeed_config(config, torch.device("cpu"), largest)["zero_optimization"]
        assert zero["overlap_comm"]
        return zero["reduce_bucket_size"]

    assert bucket(INTERNVL3_1B_HEAD) >= INTERNVL3_1B_HEAD > bucket(1000) > 1000
