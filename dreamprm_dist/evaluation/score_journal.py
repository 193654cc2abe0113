"""What has been scored so far, on disk, so that scoring can go on after it was stopped.

Each process appends a line for each question to a file of its own. A new start, with any number of
processes, first gathers the whole lines of all files: half a line, of a process that was killed
while writing, is left out and its question scored again.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from accelerate import PartialState


class ScoreJournal:
    """A folder with the scores of each question by its key, a tuple of texts and numbers.

    Args:
        settings: all that scores depend on, JSON; scores made with others are refused.

    Raises:
        ValueError: the folder holds scores made with other settings.
    """

    def __init__(self, folder: Path, settings: dict):
        self.folder, self._settings = folder, settings
        self._settings_file = self.folder / "settings.json"
        # A start that failed before its first score, say of a mistyped model, left nothing to keep.
        if self._settings_file.is_file() and self.read():
            before = json.loads(self._settings_file.read_text(encoding="utf-8"))
            different = [key for key in settings if before.get(key, settings[key]) != settings[key]]
            if different:
                raise ValueError(
                    f"{folder} holds unfinished work with another {' and '.join(different)}; "
                    "set it back to go on, write elsewhere, or remove the folder to start anew"
                )
            self._settings = before | settings

    def start(self, state: PartialState) -> dict[tuple, dict]:
        """Start this process's part; by all processes. Returns what is scored, as `read`."""
        state.wait_for_everyone()
        if state.is_main_process:
            self._gather()
        state.wait_for_everyone()
        done = self.read()
        state.wait_for_everyone()
        self._file = (self.folder / f"rank{state.process_index}.jsonl").open("w", encoding="utf-8")
        return done

    def _gather(self) -> None:
        """Bring all parts into one file."""
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

    def read(self) -> dict[tuple, dict]:
        """What is scored: key -> row."""
        lines = [
            line for file in sorted(self.folder.glob("*.jsonl")) for line in _whole_lines(file)
        ]
        rows = map(json.loads, lines)
        return {tuple(row.pop("key")): row for row in rows}

    def write(self, key: tuple, row: dict) -> None:
        """Add a question; it is on disk when this returns."""
        # Plain ASCII: half a surrogate pair in a rejected text cannot be written as UTF-8.
        self._file.write(json.dumps({"key": key} | row) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def remove(self) -> None:
        """Forget everything: all is scored and written where it belongs."""
        shutil.rmtree(self.folder)


def _whole_lines(file: Path) -> list[str]:
    *whole, _ = file.read_text(encoding="utf-8").split("\n")
    return [line + "\n" for line in whole]
