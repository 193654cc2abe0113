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

from dreamprm_dist.errors import InputError
from dreamprm_dist.files import JsonLines, json_line, whole_lines, write_whole


class ScoreJournal:
    """A folder with the scores of each question by its key, a tuple of texts and numbers.

    Args:
        settings: all that scores depend on, JSON; scores made with others are refused.

    Raises:
        InputError: the folder holds scores made with other settings.
    """

    def __init__(self, folder: Path, settings: dict):
        self.folder, self._settings = folder, settings
        self._settings_file = self.folder / "settings.json"
        # A start that failed before its first score, say of a mistyped model, left nothing to keep.
        if self._settings_file.is_file() and self.read():
            before = json.loads(self._settings_file.read_text(encoding="utf-8"))
            different = [key for key in settings if before.get(key, settings[key]) != settings[key]]
            if different:
                raise InputError(
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
        self._lines = JsonLines(self.folder / f"rank{state.process_index}.jsonl")
        return done

    def _gather(self) -> None:
        """Bring all parts into one file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self._settings_file, json_line(self._settings))
        files = sorted(self.folder.glob("*.jsonl"))
        done = self.folder / "done.jsonl"
        write_whole(done, "".join(line + "\n" for file in files for line in whole_lines(file)))
        for file in files:
            if file != done:
                file.unlink()

    def read(self) -> dict[tuple, dict]:
        """What is scored: key -> row."""
        files = sorted(self.folder.glob("*.jsonl"))
        lines = [line for file in files for line in whole_lines(file)]
        rows = map(json.loads, lines)
        return {tuple(row.pop("key")): row for row in rows}

    def write(self, key: tuple, row: dict) -> None:
        """Add a question; it is on disk when this returns."""
        self._lines.add({"key": key} | row)

    def close(self) -> None:
        self._lines.close()

    def remove(self) -> None:
        """Forget everything: all is scored and written where it belongs."""
        shutil.rmtree(self.folder)
