"""Small batches and surroundings that reweighters are tested in."""

import torch
from torch import Tensor

from dreamprm_dist.prm.batch import Batch
from dreamprm_dist.reweighters.base import Surroundings

NO_FEATURES = torch.zeros(0, 0)


def surroundings(
    rows_per_shard: list[int], num_steps: int = 1, hidden_size: int = 8, label_ids=None
) -> Surroundings:
    """Training instances whose `dataset` is "a" in even shards and "b" in odd ones."""
    return Surroundings(
        rows_per_shard,
        lambda shard: ["ab"[shard % 2]] * rows_per_shard[shard],
        num_steps,
        torch.device("cpu"),
        hidden_size,
        label_ids or {"+": 0, "-": 1},
        seed=1,
    )


def batch_of(ids: list[int] | Tensor) -> Batch:
    """Instances of one labelled step each, without inputs."""
    ids = torch.as_tensor(ids)
    rows = torch.arange(len(ids))
    no_tiles = rows[:0]
    true_false = torch.zeros(len(ids))
    return Batch(rows[:, None], None, no_tiles, rows, rows * 0, rows * 0, ids, true_false)
