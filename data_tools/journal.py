"""Candidates as they come: a file that is added to, and that a kill leaves usable."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from types import TracebackType

from dreamprm_dist.data.schema import RecordError, read_json_records


class Journal:
    """Rows with an ``id`` and a ``sample``, one line each; a context manager that holds a lock.

    Attributes:
        rows: by (id, sample), those of earlier runs included.

    Raises:
        ValueError: another run is writing the file, or it holds a row that is not among the
            ``keys`` or lacks one of the ``settings``.
    """

    def __init__(self, path: Path, keys: set[tuple[str, int]], settings: dict) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: dict[tuple[str, int], dict] = {}
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ValueError(f"{path}: another run is writing it; wait for its end.") from None
        self._cut_unfinished_line()
        for line, row in read_json_records(path):
            key = None if isinstance(row, RecordError) else (row.get("id"), row.get("sample"))
            if key not in keys or key in self.rows or not settings.items() <= row.items():
                raise ValueError(
                    f"{path}, line {line}: was not asked for by this command; run the command that "
                    "did it again, or delete the file."
                )
            self.rows[key] = row

    def _cut_unfinished_line(self) -> None:
        self._file.seek(0)
        self._file.truncate(sum(len(line) for line in self._file if line.endswith(b"\n")))

    def add(self, row: dict) -> None:
        """Write a row; when this returns, a kill does not lose it."""
        # Plain ASCII: half a surrogate pair, which a server may send, cannot be written as UTF-8.
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()
        self.rows[row["id"], row["sample"]] = row

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
