"""The rows of a global batch: a pure function of integers.

Draw d of the run comes from shard d mod S, whose own draws are an endless sequence of seeded
permutations of its rows; global batch t is draws t*G to (t+1)*G - 1. Rank r of W owns the shards
s with s mod W == r. With S and G multiples of W every rank gets G / W draws of every global batch,
and the content of the batch does not depend on W.
"""

import math
from collections.abc import Collection, Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np

from dreamprm_dist.errors import InputError


def ranks_that_work(*numbers: int) -> str:
    """The numbers of ranks that divide all of ``numbers``, as text: ``1, 2 or 4 ranks``."""
    common = math.gcd(*numbers)
    *others, last = (str(n) for n in range(1, common + 1) if common % n == 0)
    return f"{', '.join(others)} or {last} ranks" if others else f"{last} rank"


def check_ranks(
    num_shards: Mapping[Path, int], world_size: int, global_batch_sizes: Collection[int] = ()
) -> None:
    """Refuse a world size that cannot share all shards and global batches evenly.

    Args:
        num_shards: of each folder that the run reads.
        global_batch_sizes: those that the run has already; at its start they follow from the ranks.

    Raises:
        InputError: naming all world sizes that work.
    """
    numbers = [*num_shards.values(), *global_batch_sizes]
    if all(number % world_size == 0 for number in numbers):
        return
    shared = [f"{count} shards ({folder})" for folder, count in num_shards.items()]
    shared += [f"a global batch of {size}" for size in global_batch_sizes]
    again = ""
    if any(count % world_size for count in num_shards.values()):
        again = f", or shard again with a multiple of {world_size} shards"
    raise InputError(
        f"{world_size} ranks cannot share {' and '.join(shared)} evenly; use "
        f"{ranks_that_work(*numbers)}{again}"
    )


def check_every_shard_learns(
    folder: Path, num_shards: int, global_batch_size: int, unroll_steps: int
) -> None:
    """Refuse an unroll whose last batch always comes from the same shards.

    Draws go round the shards in turn, so with more shards than draws a batch the batches that
    receive a hypergradient, each `unroll_steps`-th, may miss some shards for ever.

    Raises:
        InputError: naming what to change.
    """
    starts = range(unroll_steps - 1, unroll_steps * num_shards, unroll_steps)
    last = {
        (step * global_batch_size + draw) % num_shards
        for step in starts
        for draw in range(min(global_batch_size, num_shards))
    }
    if len(last) < num_shards:
        raise InputError(
            f"{folder}: the last batch of {unroll_steps} unroll steps always comes from the same "
            f"{len(last)} of {num_shards} shards, so instances of the others would never learn a "
            "weight; use --unroll_window all, another number of steps, or num_shards that divides "
            f"the global batch of {global_batch_size}"
        )


def owned_shards(num_shards: int, rank: int, world_size: int) -> range:
    """The shards whose rows, weights and draws belong to a rank."""
    return range(rank, num_shards, world_size)


@lru_cache(maxsize=256)
def _permutation(seed: int, level: int, shard: int, epoch: int, rows: int) -> np.ndarray:
    return np.random.default_rng([seed, level, shard, epoch]).permutation(rows)


def rank_draws(
    step: int,
    global_batch_size: int,
    rows_per_shard: list[int],
    *,
    seed: int,
    level: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> list[tuple[int, int]]:
    """A rank's part of global batch `step` as (shard, row) pairs in the order of the draws.

    Args:
        rows_per_shard: rows of each of the S shards, all at least 1.
        level: keeps the orders of different data sets apart (0 lower, 1 upper).
    """
    num_shards = len(rows_per_shard)
    first = step * global_batch_size
    draws = []
    for draw in range(first + (rank - first) % world_size, first + global_batch_size, world_size):
        shard, turn = draw % num_shards, draw // num_shards
        epoch, index = divmod(turn, rows_per_shard[shard])
        order = _permutation(seed, level, shard, epoch, rows_per_shard[shard])
        draws.append((shard, int(order[index])))
    return draws
