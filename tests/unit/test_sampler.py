"""The rows of a global batch are a pure function of integers, tested without processes."""

import contextlib
import itertools
import re
from pathlib import Path

import pytest

from dreamprm_dist.data.sampler import (
    check_every_shard_learns,
    check_ranks,
    owned_shards,
    rank_draws,
    ranks_that_work,
)
from dreamprm_dist.errors import InputError

ROWS = [5, 4, 4, 4, 4, 4, 4, 4]
SIZE = 8


def batch(step: int, **place) -> list[tuple[int, int]]:
    return rank_draws(step, SIZE, ROWS, seed=3, **place)


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_the_content_of_a_global_batch_does_not_depend_on_the_world_size(world_size):
    for step in range(12):
        parts = [batch(step, rank=r, world_size=world_size) for r in range(world_size)]
        assert sorted(itertools.chain(*parts)) == sorted(batch(step))
        assert {len(part) for part in parts} == {SIZE // world_size}
        for rank, part in enumerate(parts):
            owned = owned_shards(len(ROWS), rank, world_size)
            assert all(shard in owned for shard, _ in part)


def test_each_shard_is_an_endless_sequence_of_permutations():
    draws = [draw for step in range(45) for draw in batch(step)]
    for shard, rows in enumerate(ROWS):
        own = [row for s, row in draws if s == shard]
        epochs = [own[i : i + rows] for i in range(0, len(own) - rows + 1, rows)]
        assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)
        assert len(set(map(tuple, epochs))) > 1


def test_seed_level_and_step_each_change_the_order():
    def order(**key):
        arguments = {"seed": 1, "level": 0} | key
        return [rank_draws(step, SIZE, ROWS, **arguments) for step in range(4)]

    assert order() == order()
    assert order() != order(seed=2)
    assert order() != order(level=1)


def test_a_global_batch_larger_than_the_data_draws_rows_again():
    draws = rank_draws(0, 80, ROWS, seed=1)
    assert len(draws) == 80 and len(set(draws)) == sum(ROWS)


TRAIN, META = Path("data/train"), Path("data/meta")


@pytest.mark.parametrize(
    ("shards", "sizes", "world"),
    [
        *(([8], [], 3), ([64], [], 48), ([8], [12], 8), ([64, 32], [], 64), ([7], [7, 3], 2)),
        *(([64, 55], [], 5), ([6, 9], [12, 30], 6), ([1], [], 2), ([12, 18], [24], 4)),
    ],
)
def test_all_numbers_of_ranks_that_work_are_named_and_no_others(shards, sizes, world):
    folders = dict(zip((TRAIN, META), shards, strict=False))
    with pytest.raises(InputError, match=f"^{world} ranks cannot share") as refused:
        check_ranks(folders, world, sizes)
    (named,) = re.findall(r"use ([\d, or]+) ranks?\b", str(refused.value))
    works = [int(number) for number in re.findall(r"\d+", named)]
    for ranks in range(1, 100):
        with contextlib.nullcontext() if ranks in works else pytest.raises(InputError):
            check_ranks(folders, ranks, sizes)
    # More shards help only where shards are the reason.
    hint = f"or shard again with a multiple of {world} shards"
    assert (hint in str(refused.value)) == any(number % world for number in shards)


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([8], "1, 2, 4 or 8 ranks"),
        ([7], "1 or 7 ranks"),
        ([8, 3], "1 rank"),
        ([64, 48, 24], "1, 2, 4 or 8 ranks"),
        ([12], "1, 2, 3, 4, 6 or 12 ranks"),
    ],
)
def test_numbers_of_ranks_read_well(numbers: list[int], text: str):
    assert ranks_that_work(*numbers) == text


def test_a_rank_owns_every_so_manieth_shard():
    assert [list(owned_shards(6, rank, 2)) for rank in (0, 1)] == [[0, 2, 4], [1, 3, 5]]


def test_even_shares_pass():
    check_ranks({TRAIN: 8, META: 4}, 4, [16])


@pytest.mark.parametrize(
    ("shards", "size", "steps", "reached"),
    [(8, 1, 2, 4), (64, 8, 4, 16), (64, 32, 4, 32), (8, 1, 3, 8), (8, 8, 2, 8), (4, 6, 2, 4)],
)
def test_last_batches_that_miss_shards_are_refused(shards, size, steps, reached):
    lasts = range(steps - 1, 4 * steps * shards, steps)
    drawn = {shard for step in lasts for shard, _ in rank_draws(step, size, [3] * shards, seed=1)}
    assert len(drawn) == reached
    missed = contextlib.nullcontext()
    if reached < shards:
        missed = pytest.raises(
            ValueError, match=f"data/train: .* same {reached} of {shards} shards"
        )
    with missed:
        check_every_shard_learns(Path("data/train"), shards, size, steps)
