"""Files that are no training or meta records: known by what is in them, refused with what to do."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from dreamprm_dist.data.file_kinds import (
    ARROW,
    BLANK,
    EMPTY,
    GZIP,
    LOOKED_AT,
    PARQUET,
    TEXT,
    ZIP,
    kind_of_file,
)
from dreamprm_dist.data.json_records import read_json_records, require_file
from dreamprm_dist.data.schema import kind_of_record
from dreamprm_dist.data.shards import MANIFEST
from dreamprm_dist.errors import InputError

_CONVERT = "convert it first: python -m data_tools.convert mmmu, stepwise, prm800k or math_shepherd"
_HINTS = {
    PARQUET: _CONVERT,
    ARROW: _CONVERT,
    GZIP: "unpack it first: gunzip",
    ZIP: "unpack it first: unzip",
}
_MOST_RECORDS = 20  # looked at


def refuse_other_files(source: Path, kind: str) -> None:
    """Refuse a file or folder that is known to hold something else than ``kind`` records.

    Raises:
        FileNotFoundError: no such file.
        InputError: what it is, and which command turns it into records.
    """
    if source.is_dir():
        if (source / MANIFEST).is_file():
            raise InputError(f"{source}: is a shard folder already; give it to launch/train.py.")
        if any(next(source.rglob(f"*.{end}"), None) for end in ("parquet", "arrow")):
            raise InputError(f"{source}: is a folder of Parquet or Arrow; {_CONVERT}.")
    with require_file(source).open("rb") as file:
        start = file.read(LOOKED_AT)
    if not start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"{", b"[")):
        what = kind_of_file(start)
        if what not in (None, EMPTY, BLANK, TEXT):
            hint = _HINTS.get(what, "give a JSON list or a JSONL file")
            raise InputError(f"{source}: is {what}; {hint}.")
    records = (record for _, record in read_json_records(source) if isinstance(record, dict))
    first = list(islice(records, _MOST_RECORDS))
    if any("conversations" in record for record in first):
        if kind == "meta" and not any("true_false" in record for record in first):
            raise InputError(
                f"{source}: holds training records and no meta records, for none of the first "
                f"{len(first)} has 'true_false'; are --train and --meta swapped?"
            )
    elif first and (what := kind_of_record(first[0])):
        raise InputError(f"{source}: holds no {kind} records; the first is {what}.")
