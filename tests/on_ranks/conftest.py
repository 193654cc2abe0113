"""Tests that all ranks of a process group run together; `test_on_ranks.py` starts them."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from dreamprm_dist import distributed
from dreamprm_dist.data.shards import ShardFolder
from dreamprm_dist.training.config import parse_train_config
from dreamprm_dist.training.run import TrainingRun


@pytest.fixture(scope="session", autouse=True)
def process_group() -> Iterator[torch.device]:
    """One for all tests: DeepSpeed knows no second one in a process."""
    # A rank whose test has failed comes to no more collectives; the others fail then, too.
    with distributed.joined("cpu", timeout_minutes=0.5) as device:
        yield device


@pytest.fixture
def make_run(tmp_path: Path, process_group: torch.device) -> Callable[..., TrainingRun]:
    """Makes a run in float32 by its flags, of the small demo data set or of other shards."""
    model, usual = os.environ["TESTS_ON_RANKS"].split(":")

    def make(*flags: str, shards: str = usual) -> TrainingRun:
        config = parse_train_config(
            [
                *("--precision", "fp32", "--num_workers", "0", "--device", "cpu"),
                *("--reward_model", model, "--weights_path", str(tmp_path / "run")),
                *flags,
            ]
        )
        meta = ShardFolder(f"{shards}/meta") if config.reads_meta else None
        return TrainingRun(config, ShardFolder(f"{shards}/train"), meta, process_group)

    return make
