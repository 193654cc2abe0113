"""Questions of a meta folder that are kept out of training, to measure on."""

from __future__ import annotations

import numpy as np

from dreamprm_dist.data.shards import ShardFolder, question_rows
from dreamprm_dist.errors import InputError


class RowSubset:
    """Some rows of each shard of a folder, read as if there were no others.

    Attributes:
        path, kind, num_shards: the folder's.
        num_rows, rows_per_shard: of what is in the subset; a shard may have none.
    """

    def __init__(self, shards: ShardFolder, rows: list[list[int]]):
        self._shards, self._rows = shards, rows
        self.path, self.kind, self.num_shards = shards.path, shards.kind, shards.num_shards
        self.rows_per_shard = [len(part) for part in rows]
        self.num_rows = sum(self.rows_per_shard)

    def read(self, shard: int, row: int) -> dict:
        """As `ShardFolder.read`; rows count within the subset."""
        return self._shards.read(shard, self._rows[shard][row])

    def read_column(self, shard: int, name: str) -> list:
        """As `ShardFolder.read_column`."""
        column = self._shards.read_column(shard, name)
        return [column[row] for row in self._rows[shard]]

    def questions(self, shard: int) -> list[range]:
        """As `ShardFolder.questions`."""
        return question_rows(self.read_column(shard, "group_id"))


def hold_out(shards: ShardFolder, fraction: float, seed: int) -> tuple[RowSubset, RowSubset]:
    """Split a meta folder by whole questions, within each shard: what stays, and what is held out.

    Args:
        fraction: of the questions of a shard, rounded to a whole number of them.

    Raises:
        InputError: a shard would have nothing left, or nothing is held out at all.
    """
    kept, held = [], []
    for shard in range(shards.num_shards):
        questions = shards.questions(shard)
        out = round(fraction * len(questions))
        if out == len(questions):
            raise InputError(
                f"{shards.path}: meta_validation_fraction {fraction} leaves no question in shard "
                f"{shard} of {out}; lower it, or shard again with fewer shards"
            )
        drawn = set(np.random.default_rng([seed, shard]).permutation(len(questions))[:out])
        kept.append([r for i, rows in enumerate(questions) if i not in drawn for r in rows])
        held.append([r for i, rows in enumerate(questions) if i in drawn for r in rows])
    if not any(held):
        raise InputError(
            f"{shards.path}: meta_validation_fraction {fraction} is less than one question in "
            "every shard; raise it, or shard again with fewer shards"
        )
    return RowSubset(shards, kept), RowSubset(shards, held)
