"""Files of JSON lines, as the tests of data_tools write and read them."""

import json
from collections.abc import Iterable
from pathlib import Path


def write(path: Path, records: Iterable[object]) -> Path:
    """Write a file of records, and its folder where there is none; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def lines(path: Path) -> list:
    """Read all records of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
