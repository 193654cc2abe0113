"""Files that are no training or meta records: known by what is in them, refused with what to do."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from dreamprm_dist.data.schema import read_json_records, require_file
from dreamprm_dist.data.shards import MANIFEST
from dreamprm_dist.errors import InputError

_CONVERT = "python -m data_tools.convert"
_CONVERT_MMMU = f"convert it first: {_CONVERT} mmmu"
_MAGIC = {
    b"PAR1": f"is Parquet; {_CONVERT_MMMU}",
    b"ARROW1": f"is Arrow, part of a folder; {_CONVERT_MMMU}",
    b"\x1f\x8b": "is compressed; unpack it first: gunzip",
    b"PK\x03\x04": "is a zip archive; unpack it first: unzip",
    b"\x89PNG": "is an image; name the file of records that it belongs to",
}
# Keys of a record that tell what it is, the first ones that are all there.
_OTHER_RECORDS = {
    ("steps_with_score",): f"is raw VisualPRM; convert it first: {_CONVERT} raw",
    ("question", "candidates"): "is a test file, which launch/evaluate.py reads as it is; a meta "
    f"set is made of questions and candidates: convert them first: {_CONVERT} candidates",
    ("question", "steps"): "holds solutions without labels, for launch/score.py; training wants "
    f"labelled steps: convert records that have them first, see {_CONVERT} --help",
    ("question",): "holds questions; generate candidates (python -m data_tools.generate), then "
    f"convert it first: {_CONVERT} candidates",
    ("response",): "holds candidates; convert it first, together with its questions: "
    f"{_CONVERT} candidates",
}
_LOOKED_AT = 20  # records


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
            raise InputError(f"{source}: is a folder of Parquet or Arrow; {_CONVERT_MMMU}.")
    with require_file(source).open("rb") as file:
        start = file.read(max(map(len, _MAGIC)))
    for magic, what in _MAGIC.items():
        if start.startswith(magic):
            raise InputError(f"{source}: {what}.")
    records = (record for _, record in read_json_records(source) if isinstance(record, dict))
    first = list(islice(records, _LOOKED_AT))
    if any("conversations" in record for record in first):
        if kind == "meta" and not any("true_false" in record for record in first):
            raise InputError(
                f"{source}: holds training records and no meta records, for none of the first "
                f"{len(first)} has 'true_false'; are --train and --meta swapped?"
            )
        return
    for keys, what in _OTHER_RECORDS.items():
        if first and all(key in first[0] for key in keys):
            raise InputError(f"{source}: {what}.")
