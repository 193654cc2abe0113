"""Record files in and out: JSONL read in constant memory, and written with its rejections."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from dreamprm_dist.data.schema import RecordError, read_json_records, starts_with_bracket

MAX_LINE_BYTES = 16 << 20
_BOM = b"\xef\xbb\xbf"


def stream_records(path: str | Path) -> Iterator[tuple[int, dict | RecordError]]:
    """Yield (line, record), as `read_json_records` does, holding no more than one line.

    A line that is no JSON object, or is longer than `MAX_LINE_BYTES`, is yielded as a RecordError
    that says why, and reading goes on. A JSON list is held in memory as a whole.

    Raises:
        FileNotFoundError: there is no such file.
        RecordError: a JSON list that does not parse.
    """
    path = Path(path)
    if not path.is_file() or starts_with_bracket(path):
        yield from read_json_records(path)
        return
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                while not line.endswith(b"\n") and (line := file.readline(1 << 20)):
                    pass
                yield number, RecordError(f"the line is longer than {MAX_LINE_BYTES >> 20} MiB.")
            elif line.removeprefix(_BOM).strip():
                yield number, _parse(line)


def _parse(line: bytes) -> dict | RecordError:
    try:
        record = json.loads(line.removeprefix(_BOM).decode("utf-8"))
    # RecursionError: thousands of nested brackets; a bad line must not end the whole run.
    except (ValueError, RecursionError) as error:
        return RecordError(f"not valid JSON ({error}).")
    if isinstance(record, dict):
        return record
    return RecordError(f"a record must be a JSON object, not {type(record).__name__}.")


def image_prefix(root: Path, out: Path) -> str:
    """What goes in front of an image path from ``root`` to make it start from ``out``'s folder."""
    return os.path.relpath(root.resolve(), out.resolve().parent)


def with_prefix(record: dict, prefix: str) -> dict:
    """The record with the prefix before its relative image paths, which stay whole after it."""

    def moved(image: str | list | None) -> str | list | None:
        if isinstance(image, list):
            return [moved(path) for path in image]
        return os.path.join(prefix, image) if image and prefix != os.curdir else image

    return record | {key: moved(record[key]) for key in ("image", "image_path") if key in record}


class RecordWriter:
    """Writes ``<name>.jsonl`` and, beside it, ``<name>.rejected.jsonl``.

    A context manager: both files appear when the block ends well, neither when it does not. The
    counts are `num_written` and `num_rejected`.

    Raises:
        ValueError: the name does not end in .jsonl, or a file is there and ``overwrite`` is false;
            at the end of the block: not a single record was written.
    """

    def __init__(self, path: str | Path, overwrite: bool = False) -> None:
        self.path = Path(path)
        if self.path.suffix != ".jsonl":
            raise ValueError(f"{self.path}: records are written as JSONL; end the name in .jsonl.")
        self.rejected_path = self.path.with_suffix(".rejected.jsonl")
        for existing in (self.path, self.rejected_path):
            if existing.exists() and not overwrite:
                raise ValueError(f"{existing}: is there already; pass --overwrite to replace it.")
        self.num_written = self.num_rejected = 0
        self._first_reason = ""

    def __enter__(self) -> RecordWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._records, self._rejected = (
            # backslashreplace keeps a rejected id that is no valid Unicode as a JSON escape.
            _temporary(path).open("w", encoding="utf-8", errors="backslashreplace", newline="\n")
            for path in (self.path, self.rejected_path)
        )
        return self

    def write(self, record: dict) -> None:
        self._records.write(json.dumps(record, ensure_ascii=False) + "\n")
        self.num_written += 1

    def reject(self, file: str | Path, line: int, record: object, reason: str) -> None:
        """Note that a record was not taken: its file, line, id and the reason."""
        source_id = record.get("id") if isinstance(record, dict) else None
        entry = {
            "file": str(file),
            "line": line,
            "id": source_id if isinstance(source_id, str | int) else None,
            "reason": reason,
        }
        self._rejected.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self.num_rejected += 1
        self._first_reason = self._first_reason or f"{file}, line {line}: {reason}"

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._records.close()
        self._rejected.close()
        if kind is None and self.num_written:
            for path in (self.rejected_path, self.path):
                os.replace(_temporary(path), path)
            return
        for path in (self.path, self.rejected_path):
            _temporary(path).unlink()
        if kind is None:
            raise ValueError(
                f"{self.path}: no record to write; "
                + (f"the first rejection: {self._first_reason}" if self._first_reason else "")
                + ("" if self._first_reason else "the input holds none.")
            )


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")
