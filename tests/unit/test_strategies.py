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


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero2_cpu", "zero2_offload"])
@pytest.mark.parametrize(("precision", "steps"), [("bf16", "2"), ("bf16", "1"), ("fp32", "2")])
def test_what_is_said_of_bf16(strategy: str, precision: str, steps: str) -> None:
    """For stage 1 with float32 sums DeepSpeed would make an optimizer of another kind."""
    flags = ["--strategy", strategy, "--precision", precision, "--gradient_accumulation", steps]
    settings = deepspeed_config(parse_train_config(flags), torch.device("cpu"), 1000, 1)
    assert settings["bf16"] == {"enabled": precision == "bf16", "check_grad_overflow": True}
    adds_in_float32 = precision == "bf16" and steps == "2" and strategy != "zero1"
    assert ("data_types" in settings) == adds_in_float32
