"""Records as JSON files have them: one per line (JSONL), or the entries of a list."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from dreamprm_dist.data.schema import require_object
from dreamprm_dist.errors import RecordError

MAX_LINE_BYTES = 16 << 20  # a longer line is garbage; it is skipped without being held
_BOM = b"\xef\xbb\xbf"


def read_json_records(path: str | Path) -> Iterator[tuple[int, dict | RecordError]]:
    """Yield (line, record) for JSONL or (index, record) for a JSON list, both counted from 1.

    The first non-blank character decides: ``[`` is a JSON list (held in memory as a whole),
    anything else is JSONL, of which no more than one line is held. UTF-8, with or without a byte
    order mark. A line, or an entry, that is no JSON object is yielded as a RecordError that says
    why, as is a line longer than `MAX_LINE_BYTES`, and reading goes on.

    Raises:
        FileNotFoundError: there is no such file.
        RecordError: a malformed JSON list, with file, line and column.
    """
    path = require_file(path)
    if starts_with_bracket(path):
        values = load_json_list(path)
        return ((index, _object(value)) for index, value in enumerate(values, start=1))
    return _read_lines(path)


def require_file(path: str | Path) -> Path:
    """The path of a record file; FileNotFoundError when there is none."""
    path = Path(path)
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "no such file"
        raise FileNotFoundError(f"{path}: {what}; give a JSON list or a JSONL file.")
    return path


def _read_lines(path: Path) -> Iterator[tuple[int, dict | RecordError]]:
    with path.open("rb") as file:
        for number, line in json_lines(file):
            yield number, parse_line(line)


def json_lines(file: BinaryIO, number: int = 1) -> Iterator[tuple[int, bytes | None]]:
    """Yield (number, line) for the lines that are not blank; None for one that is too long.

    Args:
        number: of the line that the file stands at.
    """
    while line := file.readline(MAX_LINE_BYTES + 1):
        if len(line) > MAX_LINE_BYTES:
            while not line.endswith(b"\n") and (line := file.readline(1 << 20)):
                pass
            yield number, None
        elif line.removeprefix(_BOM).strip():
            yield number, line
        number += 1


def parse_line(line: bytes | None) -> dict | RecordError:
    """The record in a line of `json_lines`, or what is wrong with it."""
    if line is None:
        return RecordError(f"the line is longer than {MAX_LINE_BYTES >> 20} MiB; remove it.")
    try:
        return _object(json.loads(line.removeprefix(_BOM).decode("utf-8")))
    # RecursionError: thousands of nested brackets; a bad line must not end the whole run.
    except (ValueError, RecursionError) as error:
        return RecordError(f"not valid JSON ({error}); fix or remove the line.")


def _object(value: object) -> dict | RecordError:
    try:
        return require_object(value)
    except RecordError as error:
        return error


def starts_with_bracket(path: Path) -> bool:
    """Whether a file holds a JSON list and not JSONL."""
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(_BOM).lstrip()
        while not start and (block := file.read(4096)):
            start = block.lstrip()
    return start.startswith(b"[")


def load_json_list(path: Path) -> list:
    """The entries of a JSON list; RecordError with line and column when it is malformed."""
    data = path.read_bytes()
    try:
        return json.loads(data.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        where, what = f"line {error.lineno}, column {error.colno}", error.msg
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        where, what = f"line {line}, column {column}", "not UTF-8"
    except (ValueError, RecursionError) as error:
        where, what = "line 1, column 1", str(error)
    raise RecordError(f"{path}, {where}: the JSON list is malformed ({what}); fix the file.")
