"""Candidates as they come: a file that is added to, and that a kill leaves usable."""

from __future__ import annotations

from pathlib import Path

from dreamprm_dist.data.json_records import read_json_records
from dreamprm_dist.errors import InputError, RecordError
from dreamprm_dist.files import JsonLines


class Journal:
    """Rows with an ``id`` and a ``sample``, one line each; locked until it is closed.

    Attributes:
        rows: by (id, sample), those of earlier runs included.

    Raises:
        InputError: another run is writing the file, or it holds a row that is not among the
            ``keys`` or lacks one of the ``settings``.
    """

    def __init__(self, path: Path, keys: set[tuple[str, int]], settings: dict) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: dict[tuple[str, int], dict] = {}
        self._lines = JsonLines(path, lock=True)
        for line, row in read_json_records(path):
            found = {} if isinstance(row, RecordError) else row
            key = (found.get("id", ""), found.get("sample", -1))
            if key not in keys or key in self.rows or not settings.items() <= found.items():
                raise InputError(
                    f"{path}, line {line}: was not asked for by this command; run the command that "
                    "did it again, or delete the file."
                )
            self.rows[key] = found

    def add(self, row: dict) -> None:
        """Write a row; when this returns, a kill does not lose it."""
        self._lines.add(row)
        self.rows[row["id"], row["sample"]] = row

    def close(self) -> None:
        """Give up the lock."""
        self._lines.close()
