"""What an evaluation has scored so far, on disk, so that it can go on after it was stopped.

Each process appends a line for each question to a file of its own. A new start, with any number of
processes, first gathers the whole lines of all files: half a line, of a process that was killed
while writing, is left out and its question scored again.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple


class Key(NamedTuple):
    """A question that a PRM scores: the PRM's label, `test` or `meta`, the question's index."""

    prm: str
    set: str
    question: int


class ScoreParts:
    """The folder `parts` in an evaluation's output folder.

    Args:
        settings: all that scores depend on, JSON; parts of other settings are refused.

    Raises:
        ValueError: the folder holds parts of an evaluation with other settings.
    """

    def __init__(self, out: Path, settings: dict):
        self.folder, self._settings = out / "parts", settings
        self._settings_file = self.folder / "settings.json"
        if self._settings_file.is_file():
            before = json.loads(self._settings_file.read_text(encoding="utf-8"))
            if different := [key for key in settings if settings[key] != before.get(key)]:
                raise ValueError(
                    f"{out} holds an unfinished evaluation with another {' and '.join(different)}; "
                    f"choose another output_dir, or remove {self.folder} to start anew"
                )

    def gather(self) -> None:
        """Bring all parts into one file; by one process, before any opens its part."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._settings_file.write_text(json.dumps(self._settings) + "\n", encoding="utf-8")
        files = sorted(self.folder.glob("*.jsonl"))
        lines = [line for file in files for line in _whole_lines(file)]
        new, done = self.folder / "done.new", self.folder / "done.jsonl"
        new.write_text("".join(lines), encoding="utf-8")
        new.replace(done)
        for file in files:
            if file != done:
                file.unlink()

    def read(self) -> dict[Key, dict]:
        """What is scored: for each question `scores` (of each candidate's steps) or `error`."""
        lines = [
            line for file in sorted(self.folder.glob("*.jsonl")) for line in _whole_lines(file)
        ]
        rows = map(json.loads, lines)
        return {Key(*row.pop("key")): row for row in rows}

    def open(self, rank: int) -> None:
        """Start this process's part."""
        self._file = (self.folder / f"rank{rank}.jsonl").open("w", encoding="utf-8")

    def write(self, key: Key, row: dict) -> None:
        """Add a question; it is on disk when this returns."""
        # Plain ASCII: half a surrogate pair in a rejected text cannot be written as UTF-8.
        self._file.write(json.dumps({"key": key} | row) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def remove(self) -> None:
        """Forget everything: the evaluation is finished."""
        shutil.rmtree(self.folder)


def _whole_lines(file: Path) -> list[str]:
    *whole, _ = file.read_text(encoding="utf-8").split("\n")
    return [line + "\n" for line in whole]
