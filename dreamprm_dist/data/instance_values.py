"""A number for each training instance, as a Parquet file has it: weights, losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dreamprm_dist.data.shards import ShardFolder
from dreamprm_dist.errors import InputError


@dataclass
class InstanceValues:
    """The rows of a file, n of them.

    Attributes:
        path: the file.
        name: the column that was read.
        values: (n,) float64; NaN where the file has nothing or no number.
        sample_ids, source_ids: of each row; None where the file has no such column.
    """

    path: Path
    name: str
    values: np.ndarray
    sample_ids: list[int] | None
    source_ids: list[str] | None

    @classmethod
    def read(cls, path: Path, name: str) -> InstanceValues:
        """Read a column of numbers, and the columns `sample_id` and `source_id` as far as there.

        Raises:
            InputError: no Parquet file, no such column, none of the IDs, or an ID is missing or of
                another type.
        """
        if not path.is_file():
            raise InputError(f"{path}: no such file; give a Parquet file with a column {name!r}")
        try:
            table = pq.read_table(path)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path}: cannot be read as Parquet ({error}); write it again") from (
                error
            )
        if name not in table.column_names:
            there = ", ".join(table.column_names)
            raise InputError(f"{path}: has no column {name!r} ({there} are there); add it")
        if not {"sample_id", "source_id"} & {*table.column_names}:
            raise InputError(
                f"{path}: has neither sample_id nor source_id; add one, so that each {name} finds "
                "its instance"
            )
        values = _column(table, path, name, pa.float64(), "numbers")
        return cls(
            path,
            name,
            np.array([np.nan if value is None else value for value in values], dtype=np.float64),
            _ids(table, path, "sample_id", pa.int64(), "integers"),
            _ids(table, path, "source_id", pa.string(), "texts"),
        )

    def by_sample_id(self, shards: ShardFolder) -> np.ndarray:
        """The values in the order of the shards' sample IDs (instances,), each instance once.

        Rows are found by `source_id` where no two instances and no two rows share one, else by
        `sample_id`; then source IDs, where the file has them, must be the shards'.

        Raises:
            InputError: a row is missing, repeated or of no instance, or source IDs differ.
        """
        there = source_ids_of(shards)
        mine = self.source_ids
        if mine is not None and not (twice := repeated(mine) or repeated(there)):
            return self._matched(mine, there, "source_id", shards.path)
        if self.sample_ids is None:
            raise InputError(
                f"{self.path}: source_id {twice!r} is that of several instances or rows, which no "
                "sample_id tells apart; add a column sample_id"
            )
        if (again := repeated(self.sample_ids)) is not None:
            raise InputError(f"{self.path}: sample_id {again} has several rows; leave one of them")
        values = self._matched(self.sample_ids, range(len(there)), "sample_id", shards.path)
        for sample_id, source_id in zip(self.sample_ids, mine or [], strict=False):
            if source_id != there[sample_id]:
                raise InputError(
                    f"{self.path}: sample_id {sample_id} is {source_id!r} there and "
                    f"{there[sample_id]!r} in {shards.path}; give the file of these shards"
                )
        return values

    def _matched(
        self,
        mine: Sequence[int] | Sequence[str],
        there: Sequence[int] | Sequence[str],
        kind: str,
        folder: Path,
    ) -> np.ndarray:
        place = {key: row for row, key in enumerate(mine)}
        if missing := [key for key in there if key not in place]:
            raise InputError(
                f"{self.path}: has no {self.name} for {kind} {missing[0]!r}{_more(missing)} of "
                f"{folder}; add a row for every instance"
            )
        if extra := sorted(place.keys() - {*there}, key=place.__getitem__):
            raise InputError(
                f"{self.path}: {kind} {extra[0]!r}{_more(extra)} is not in {folder}; leave such "
                "rows out, or train on the shards that the file was made for"
            )
        return self.values[[place[key] for key in there]]


def source_ids_of(shards: ShardFolder) -> list[str]:
    """Source IDs in the order of sample IDs; reads the column of every shard."""
    source_ids = [""] * shards.num_rows
    for shard in range(shards.num_shards):
        source_ids[shard :: shards.num_shards] = shards.read_column(shard, "source_id")
    return source_ids


def repeated(keys: Sequence[int] | Sequence[str]) -> int | str | None:
    """The first key that stands several times, if any does."""
    seen: set[int | str] = set()
    for key in keys:
        if key in seen:
            return key
        seen.add(key)
    return None


def _more(keys: Sequence) -> str:
    return f" and {len(keys) - 1} more" if len(keys) > 1 else ""


def _column(table: pa.Table, path: Path, name: str, kind: pa.DataType, words: str) -> list:
    try:
        return table.column(name).cast(kind).to_pylist()
    except pa.ArrowException as error:
        raise InputError(f"{path}: {name} must hold {words} ({error}); correct the column") from (
            error
        )


def _ids(table: pa.Table, path: Path, name: str, kind: pa.DataType, words: str) -> list | None:
    if name not in table.column_names:
        return None
    ids = _column(table, path, name, kind, words)
    if None in ids:
        raise InputError(f"{path}: row {ids.index(None) + 1} has no {name}; give every row its own")
    return ids
