"""The rows of a data set as downloaded: which files belong to which split, and what is in them.

Understood are Parquet files and folders that `datasets` saved (`save_to_disk`), below one folder or
alone. Layouts differ in where the split's name stands:

    data/test-00000-of-00001.parquet    Art/validation-00000-of-00001.parquet    Art_dev.parquet
    Art/dev/0000.parquet    Art/partial-validation/0000.parquet    train/split.parquet
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from dreamprm_dist.errors import InputError

SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval")
_BATCH_ROWS = 8  # a row may hold seven images of megabytes
# A file of a split may say which piece it is: -00000-of-00002, _1, -00000-of-00002-0f3a9c2b.
_STEM = re.compile(
    r"(.*?)(?:(?:[-_.](?:part|shard|chunk|batch))?[-_.]?\d+(?:-of-\d+)?(?:-[0-9a-f]+)?)?"
)
_NO_NAME = ("", "data", "dataset", "file", "part", "split")
_FOLDER_MARKS = ("partial-", "split=")  # the hub's for the start of a large split; Hive's


# A column that each kind of data set must have, and what to do where it is missing.
COLUMNS = {
    "question": "take a config that has the question as text, such as MMMU-Pro's two named "
    "standard",
    "completions": "TRL's stepwise supervision has prompt, completions and labels",
    "label": "PRM800K has question and label",
    "input": "Math-Shepherd has input, label and task",
}


def read_rows(
    source: Path, split: str | None, column: str = "question"
) -> Iterator[tuple[str, int, dict]]:
    """(file, row counted from 1, row) of a split, in the order of paths; images stay encoded.

    ``source`` is a file or a folder; one of several data sets, such as MMMU's subjects, gives the
    rows of all of them. What is hidden, and whatever else lies there, does not count.

    Args:
        column: one that must be there, of `COLUMNS`.

    Raises:
        FileNotFoundError: no such source, or it holds no data.
        InputError: it has several splits and ``split`` chooses none of them; a file is broken or
            lacks the column.
    """
    parts = find_parts(source)
    if not parts:
        what = "neither Parquet files nor a datasets folder" if source.exists() else "not there"
        raise FileNotFoundError(f"{source}: {what}.")
    names = sorted(set(parts.values()))
    if split not in names and (split is not None or len(names) > 1):
        raise InputError(f"{source}: choose one of its splits with --split: {', '.join(names)}.")
    chosen = [
        (part, _batches(part, column)) for part, name in parts.items() if split in (None, name)
    ]
    return chain.from_iterable(_numbered(part, batches) for part, batches in chosen)


def find_parts(source: Path) -> dict[Path, str]:
    """From each Parquet file and saved folder of a source to its split, in the order of paths."""
    if source.is_file():
        return {source: _split_name(source, [source.resolve().parent.name])}
    parts = {}
    for path in sorted([*source.rglob("*.parquet"), *source.rglob("state.json")]):
        inside = path.relative_to(source).parts
        if any(name.startswith(".") for name in inside):
            continue
        # The folder that was asked for may be that of one split.
        folders = [source.resolve().name, *inside[:-1]]
        if path.suffix == ".parquet":
            parts[path] = _split_name(path, folders)
        elif path.with_name("dataset_info.json").is_file():
            parts[path.parent] = _saved_split(path.parent) or _split_name(path, folders)
    return parts


def _saved_split(folder: Path) -> str:
    if (folder.parent / "dataset_dict.json").is_file():
        return folder.name
    split = datasets.load_from_disk(str(folder)).split
    return str(split or "").partition("[")[0]  # validation[:100] is of validation


def _split_name(file: Path, folders: list[str]) -> str:
    """The innermost name of a split in a path; where none is a usual one, the file's own name.

    A file without a name of its own, such as 0000.parquet, has that of its folder.
    """
    stem = file.stem
    match = _STEM.fullmatch(stem)
    base = match[1] if match else stem
    for mark in _FOLDER_MARKS:
        folders = [name.removeprefix(mark) for name in folders]
    for name in (base, re.split(r"[-_.]", base)[-1], *reversed(folders)):
        if name.lower() in SPLITS:
            return name
    if base.lower() in _NO_NAME or file.name == "state.json":
        return folders[-1]
    return re.sub(r"-\d+-of-\d+.*", "", stem)


def _batches(part: Path, column: str) -> Iterator[pa.Table | pa.RecordBatch]:
    """A part's rows, encoded; InputError when they lack the column."""
    batches: Iterator[pa.Table | pa.RecordBatch]
    if part.is_dir():
        # The Arrow format gives the stored bytes; the default would decode every image.
        data = datasets.load_from_disk(str(part)).with_format("arrow")
        names, batches = data.column_names, data.iter(batch_size=_BATCH_ROWS)
    else:
        try:
            file = pq.ParquetFile(part)
        except pa.ArrowException as error:
            # What git leaves without LFS is a few lines of text.
            raise InputError(f"{part}: no Parquet file; download it again, whole.") from error
        names, batches = file.schema_arrow.names, file.iter_batches(batch_size=_BATCH_ROWS)
    if column not in names:
        pictured = column == "question" and "image" in names
        where = "it stands in the picture" if pictured else f"but {', '.join(names)}"
        raise InputError(f"{part}: there is no column {column!r} ({where}); {COLUMNS[column]}.")
    return batches


def _numbered(part: Path, batches: Iterator) -> Iterator[tuple[str, int, dict]]:
    rows = chain.from_iterable(batch.to_pylist() for batch in batches)
    return ((str(part), number, row) for number, row in enumerate(rows, start=1))
