"""Reading shard folders: ``manifest.json`` and Parquet shards in small row groups.

Row groups are small because one random row costs one decoded row group, images included.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections import OrderedDict
from itertools import accumulate, pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dreamprm_dist.errors import InputError
from dreamprm_dist.files import file_sha256

FORMAT_VERSION = 2
_READ_VERSIONS = (1, FORMAT_VERSION)  # 1: no step knows its roll-outs
MANIFEST = "manifest.json"
REJECTED = "rejected.jsonl"
ROW_GROUP_ROWS = 16
BELOW = {"training": "train", "meta": "meta"}  # a folder that holds one of each kind

_TRAINING_FIELDS = [
    pa.field("sample_id", pa.int64(), nullable=False),
    pa.field("source_id", pa.string(), nullable=False),
    pa.field("dataset", pa.string(), nullable=False),
    pa.field("conversations", pa.string(), nullable=False),
    pa.field("images", pa.list_(pa.binary()), nullable=False),
    pa.field("image_sizes", pa.list_(pa.list_(pa.int32())), nullable=False),
]
_META_FIELDS = [
    pa.field("group_id", pa.int64(), nullable=False),
    pa.field("true_false", pa.bool_(), nullable=False),
    pa.field("response", pa.string(), nullable=False),
]
SCHEMAS = {
    "training": pa.schema(_TRAINING_FIELDS),
    "meta": pa.schema(_TRAINING_FIELDS + _META_FIELDS),
}


def shards_at(path: Path, kind: str) -> Path:
    """The shard folder that a path stands for: itself, or the one of this kind below it."""
    below = path / BELOW[kind]
    is_above = (below / MANIFEST).is_file() and not (path / MANIFEST).is_file()
    return below if is_above else path


def question_rows(ids: list[int]) -> list[range]:
    """The rows of each question, of which each has its question's ID; they follow each other."""
    starts = [row for row, group in enumerate(ids) if row == 0 or group != ids[row - 1]]
    return [range(a, b) for a, b in pairwise([*starts, len(ids)])]


class ShardFolder:
    """A finished shard folder, read row by row.

    Picklable and safe across ``fork``: files are opened on first use, in the process that reads.
    Not safe for several threads at once.

    Attributes:
        path: the folder.
        manifest: ``manifest.json`` as it is.
        kind: "training" or "meta".
        num_shards, num_rows: counts.
        num_groups: questions in a meta folder; None in a training folder.
        rows_per_shard: rows of each shard, length ``num_shards``.

    Raises:
        FileNotFoundError: no such folder, or a shard file is missing.
        InputError: the folder is unfinished, empty, or not one this version reads.
    """

    def __init__(self, path: str | Path, cache_row_groups: int = 64) -> None:
        """``cache_row_groups``: decoded row groups (up to 16 rows each) kept in memory."""
        self.path = Path(path)
        self.manifest = _read_manifest(self.path)
        self.kind: str = self.manifest["kind"]
        self.num_shards: int = self.manifest["num_shards"]
        self.num_rows: int = self.manifest["num_rows"]
        self.num_groups: int | None = self.manifest["num_groups"]
        self.rows_per_shard: list[int] = [shard["rows"] for shard in self.manifest["shards"]]
        self._files = [self.path / shard["file"] for shard in self.manifest["shards"]]
        self._cache_row_groups = cache_row_groups
        self._forget()

    def read(self, shard: int, row: int) -> dict:
        """One row as a dict with the columns of `SCHEMAS`; ``conversations`` is JSON-decoded.

        ``images`` is a list of encoded image files (bytes), ``image_sizes`` a [width, height]
        in pixels for each.

        Raises:
            IndexError: no such shard or row.
            InputError: the shard file is broken.
        """
        self._check_shard(shard)
        if not 0 <= row < self.rows_per_shard[shard]:
            raise IndexError(
                f"{self._files[shard]}: no row {row}, the shard has {self.rows_per_shard[shard]}."
            )
        _, starts = self._open(shard)
        group = bisect_right(starts, row) - 1
        table = self._row_group(shard, group)
        values = table.slice(row - starts[group], 1).to_pylist()[0]
        values["conversations"] = json.loads(values["conversations"])
        return values

    def read_column(self, shard: int, name: str) -> list:
        """One column of a whole shard, without reading the others (the images above all).

        ``conversations`` is JSON-decoded, as in `read`.

        Raises:
            IndexError: no such shard.
            InputError: no such column, or the shard file is broken.
        """
        self._check_shard(shard)
        names = SCHEMAS[self.kind].names
        if name not in names:
            raise InputError(
                f"{self.path}: a {self.kind} shard has no column {name!r}; use one of "
                f"{', '.join(names)}."
            )
        file, _ = self._open(shard)
        try:
            values = file.read(columns=[name], use_threads=False).column(name).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise self._broken(shard, error) from error
        return [json.loads(value) for value in values] if name == "conversations" else values

    def questions(self, shard: int) -> list[range]:
        """The rows of each question in a shard of a meta folder.

        Raises:
            InputError: a training folder, whose records are no candidates for a question.
        """
        return question_rows(self.read_column(shard, "group_id"))

    def verify(self) -> None:
        """Compare every shard's SHA-256 with the manifest's; reads every byte.

        Raises:
            InputError: a shard differs; the message names it.
        """
        for file, shard in zip(self._files, self.manifest["shards"], strict=True):
            if file_sha256(file) != shard["sha256"]:
                raise InputError(
                    f"{file}: SHA-256 differs from the manifest's, so the file is damaged or was "
                    "changed; copy it again or shard the source again."
                )

    def __getstate__(self) -> dict:
        state = self.__dict__.copy()
        for name in ("_pid", "_open_files", "_cache"):
            del state[name]
        return state

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._forget()

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._open_files: dict[int, tuple[pq.ParquetFile, list[int]]] = {}
        self._cache: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()

    def _check_shard(self, shard: int) -> None:
        if not 0 <= shard < self.num_shards:
            raise IndexError(f"{self.path}: no shard {shard}, there are {self.num_shards}.")

    def _broken(self, shard: int, error: Exception) -> InputError:
        return InputError(
            f"{self._files[shard]}: cannot be read as Parquet ({error}); copy the file again or "
            "shard the source again."
        )

    def _open(self, shard: int) -> tuple[pq.ParquetFile, list[int]]:
        """The shard's open file and the first row of each of its row groups."""
        if self._pid != os.getpid():  # forked: a parent's handle must not be shared
            self._forget()
        if shard not in self._open_files:
            path, rows = self._files[shard], self.rows_per_shard[shard]
            try:
                file = pq.ParquetFile(path, memory_map=True)
            except (pa.ArrowException, OSError) as error:
                raise self._broken(shard, error) from error
            meta = file.metadata
            if meta.num_rows != rows:
                raise InputError(
                    f"{path}: has {meta.num_rows} rows where the manifest says {rows}; copy it "
                    "again or shard the source again."
                )
            sizes = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
            self._open_files[shard] = file, list(accumulate(sizes[:-1], initial=0))
        return self._open_files[shard]

    def _row_group(self, shard: int, group: int) -> pa.Table:
        key = (shard, group)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        file, _ = self._open(shard)
        try:
            # No threads: the data loader's workers are the parallelism, one core each.
            table = file.read_row_group(group, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise self._broken(shard, error) from error
        self._cache[key] = table
        if len(self._cache) > self._cache_row_groups:
            self._cache.popitem(last=False)
        return table


def _read_manifest(folder: Path) -> dict:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such shard folder; run python -m data_tools.shard.")
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(
            f"{folder}: has no {MANIFEST}, so sharding did not finish; run "
            "python -m data_tools.shard again."
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version, kind = manifest["format_version"], manifest["kind"]
        if version not in _READ_VERSIONS:
            raise InputError(
                f"{path}: format version {version!r}, but this release reads "
                f"{' and '.join(map(str, _READ_VERSIONS))}; shard the source again."
            )
        if kind not in SCHEMAS:
            raise InputError(f"{path}: unknown kind {kind!r}; use one of {', '.join(SCHEMAS)}.")
        num_rows, shards = manifest["num_rows"], manifest["shards"]
        files, rows = [s["file"] for s in shards], [s["rows"] for s in shards]
        complete = len(shards) == manifest["num_shards"] and sum(rows) == num_rows
        complete &= all("sha256" in s for s in shards) and "num_groups" in manifest
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: damaged manifest ({type(error).__name__}: {error}); shard the source again."
        ) from error
    if num_rows == 0:
        raise InputError(f"{folder}: the {kind} data set is empty; shard a file with records.")
    # A file name with a folder in it would read from outside the shard folder.
    if not complete or min(rows) < 1 or any(Path(name).name != name for name in files):
        raise InputError(f"{path}: the manifest contradicts itself; shard the source again.")
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise FileNotFoundError(
            f"{folder}: {len(missing)} of {len(files)} shard files are missing (first: "
            f"{missing[0]}); copy the folder again or shard the source again."
        )
    return manifest
