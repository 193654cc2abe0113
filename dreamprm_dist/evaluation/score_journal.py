"""Scoring that all ranks share, and that goes on after it was stopped.

Each rank appends a line for each question to a file of its own. A new start, on any number of
ranks, first gathers the whole lines of all files: half a line, of a rank that was killed while
writing, is left out and its question scored again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from dreamprm_dist.distributed import barrier, rank, sole_use, world_size
from dreamprm_dist.errors import InputError, RecordError
from dreamprm_dist.files import JsonLines, json_line, whole_lines, write_whole

Question = TypeVar("Question")
Keyed = tuple[tuple, Question]  # the key is of texts and numbers


class ScoreJournal:
    """A folder with the scores of each question by its key.

    Args:
        settings: all that scores depend on, JSON; scores made with others are refused.

    Raises:
        InputError: the folder holds scores made with other settings.
    """

    def __init__(self, folder: Path, settings: dict):
        self.folder, self._settings = folder, settings
        self._held = ExitStack()
        self._settings_file = self.folder / "settings.json"
        # A start that failed before its first score, say of a mistyped model, left nothing to keep.
        if self._settings_file.is_file() and self._read():
            before = json.loads(self._settings_file.read_text(encoding="utf-8"))
            different = [key for key in settings if before.get(key, settings[key]) != settings[key]]
            if different:
                raise InputError(
                    f"{folder} holds unfinished work with another {' and '.join(different)}; "
                    "set it back to go on, write elsewhere, or remove the folder to start anew"
                )
            self._settings = before | settings

    def start(self) -> None:
        """Start this rank's part; by all ranks.

        Raises:
            InputError: another run scores into the folder.
        """
        self._held.enter_context(sole_use(self.folder))
        if rank() == 0:
            self._gather()
        barrier()
        self._done = self._read()
        barrier()
        self._lines = JsonLines(self.folder / f"rank{rank()}.jsonl")

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

    def _read(self) -> dict[tuple, dict]:
        files = sorted(self.folder.glob("*.jsonl"))
        lines = [line for file in files for line in whole_lines(file)]
        rows = map(json.loads, lines)
        return {tuple(row.pop("key")): row for row in rows}

    def mine(self, questions: Iterable[Keyed[Question]]) -> Iterator[Keyed[Question]]:
        """This rank's part of the questions that are not scored yet; all ranks give the same."""
        left = (question for question in questions if question[0] not in self._done)
        return islice(left, rank(), None, world_size())

    def score(
        self, name: str, mine: Iterable[Keyed[Question]], score: Callable[[Question], dict]
    ) -> None:
        """Score this rank's part; a question is on disk before the next one.

        Args:
            name: of the progress that rank 0 shows.
            score: gives a question's row; of one that cannot be scored, the row is its `error`.
        """
        for key, question in tqdm(mine, desc=name, disable=rank() > 0):
            try:
                row = score(question)
            except RecordError as error:
                row = {"error": str(error)}
            self._lines.add({"key": key} | row)

    def finish(self, write: Callable[[dict[tuple, dict]], str]) -> str:
        """Wait for all ranks; rank 0 writes all scores, and then removes the folder.

        Args:
            write: puts rows by key where they belong, and says so in a text.

        Returns:
            The text on rank 0, nothing ("") elsewhere.
        """
        self._lines.close()
        barrier()
        if rank():
            return ""
        text = write(self._read())
        shutil.rmtree(self.folder)
        self._held.close()
        return text
