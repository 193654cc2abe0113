"""Records out: JSONL with its rejections beside it, and image paths that start from its folder."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

from dreamprm_dist.data.schema import read_json_records
from dreamprm_dist.errors import InputError, RecordError
from dreamprm_dist.files import whole_file


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a command that writes records."""
    parser.add_argument("--out", type=Path, required=True, help="the .jsonl file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def read_with_progress(path: Path) -> Iterable[tuple[int, dict | RecordError]]:
    """As `read_json_records`, with a progress bar on a terminal."""
    return tqdm(read_json_records(path), desc=path.name, unit="rec", disable=None)


def image_prefix(root: Path, out: Path) -> str:
    """The path that makes an image path from ``root`` start from ``out``'s folder."""
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
        InputError: the name does not end in .jsonl, or a file is there and ``overwrite`` is false;
            at the end of the block: not a single record was written.
    """

    def __init__(self, path: str | Path, overwrite: bool = False) -> None:
        self.path = Path(path)
        if self.path.suffix != ".jsonl":
            raise InputError(f"{self.path}: records are written as JSONL; end the name in .jsonl.")
        self.rejected_path = self.path.with_suffix(".rejected.jsonl")
        for existing in (self.path, self.rejected_path):
            if existing.exists() and not overwrite:
                raise InputError(f"{existing}: is there already; pass --overwrite to replace it.")
        self.num_written = self.num_rejected = 0
        self._first_reason = ""

    def __enter__(self) -> RecordWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._stack = contextlib.ExitStack()
        # The last one entered appears first: records never without their rejections.
        self._records, self._rejected = (
            self._stack.enter_context(
                # backslashreplace keeps a rejected id that is no valid Unicode as a JSON escape.
                self._stack.enter_context(whole_file(path)).open(
                    "w", encoding="utf-8", errors="backslashreplace", newline="\n"
                )
            )
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

    def summary(self, written: str = "records", rejected: str = "rejected") -> str:
        """One line for whoever ran the command; the words say what the two counts are of."""
        see = f" (see {self.rejected_path})" if self.num_rejected else ""
        return f"{self.path}: {self.num_written} {written}, {self.num_rejected} {rejected}{see}"

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None and not self.num_written:
            why = f"the first rejection: {self._first_reason}" if self._first_reason else ""
            empty = InputError(f"{self.path}: no record to write; {why or 'the input holds none.'}")
            self._stack.__exit__(InputError, empty, None)
            raise empty
        self._stack.__exit__(kind, error, traceback)
