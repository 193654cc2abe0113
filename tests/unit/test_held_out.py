"""Held-out questions: whole ones, apart from what is trained on, the same for the same seed."""

from pathlib import Path

import pytest
import torch

from dreamprm_dist.data.held_out import hold_out
from dreamprm_dist.data.shards import ShardFolder
from dreamprm_dist.training.full_pass import mean_loss


@pytest.fixture(scope="module")
def shards(tiny_shards: Path) -> ShardFolder:
    return ShardFolder(tiny_shards / "meta")


def ids(folder, column: str = "sample_id") -> list:
    return [x for shard in range(folder.num_shards) for x in folder.read_column(shard, column)]


def test_questions_are_split_and_none_is_lost(shards: ShardFolder):
    kept, held = hold_out(shards, 0.5, seed=1)
    assert sorted(ids(kept) + ids(held)) == sorted(ids(shards))
    assert not set(ids(kept, "group_id")) & set(ids(held, "group_id"))
    for part in (kept, held):
        assert part.num_rows == sum(part.rows_per_shard) == len(ids(part)) > 0
        for shard in range(part.num_shards):
            column = part.read_column(shard, "sample_id")
            rows = [part.read(shard, row)["sample_id"] for row in range(part.rows_per_shard[shard])]
            assert rows == column
            assert [r for rows in part.questions(shard) for r in rows] == list(range(len(column)))
    assert ids(hold_out(shards, 0.5, seed=1)[1]) == ids(held)
    assert any(ids(hold_out(shards, 0.5, seed=s)[1]) != ids(held) for s in range(2, 9))


@pytest.mark.parametrize(
    ("fraction", "message"), [(0.99, "leaves no question in shard"), (0.01, "less than one")]
)
def test_a_fraction_that_does_not_split_is_refused(shards: ShardFolder, fraction, message):
    with pytest.raises(ValueError, match=message):
        hold_out(shards, fraction, seed=1)


@pytest.mark.usefixtures("one_rank")
def test_the_mean_counts_rows_and_not_batches():
    batches = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0])]
    assert mean_loss(lambda batch: batch, batches, lambda output, _: output, "cpu") == 4
