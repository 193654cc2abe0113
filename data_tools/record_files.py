"""Records in and out: their ids and image paths, and JSONL with its rejections beside it."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

from dreamprm_dist.data.json_records import read_json_records
from dreamprm_dist.data.question_key import NO_ID
from dreamprm_dist.errors import InputError, RecordError
from dreamprm_dist.files import refuse_overwriting, whole_file

# Where the archive of VisualPRM400K has an image, after what its annotations say.
ARCHIVE_RULES = (
    (re.compile(r"VisualPRM400K[^/]*/(?=.)"), "images/"),
    (re.compile(r"images/(?=.)"), "images/nlvr2/images/"),
)


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a command that writes records."""
    parser.add_argument("--out", type=Path, required=True, help="the .jsonl file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def add_limit(parser: argparse.ArgumentParser) -> None:
    """Add the flag of a command that may read a part of its input, to try it."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"must be 1 or more, not {text}")
        return int(text)

    parser.add_argument(
        "--limit", type=number, help="read the first LIMIT records of each input (default: all)"
    )


def read_with_progress(
    path: Path, limit: int | None = None
) -> Iterable[tuple[int, dict | RecordError]]:
    """As `read_json_records`, with a progress bar on a terminal; at most ``limit`` records."""
    records = islice(read_json_records(path), limit)
    return tqdm(records, desc=path.name, unit="rec", total=limit, disable=None)


def with_source_id(record: dict, file: str | Path, line: int | str) -> dict:
    """A training record with an id: where it is missing or -1, ``<file name>:<line>``.

    What is no training record stays as it is: meta records without an id belong together by image
    and question (`question_key`).
    """
    keys = {"conversations", "steps_with_score", "completions"}
    is_training = "true_false" not in record and keys & set(record)
    if is_training and (record.get("id") is None or str(record["id"]) in NO_ID):
        return record | {"id": f"{Path(file).name}:{line}"}
    return record


def find_image(path: str, root: Path) -> tuple[str, int | None]:
    """Where an image lies under ``root``, and the number of the archive's rule that found it.

    The path as it is written comes first, and is what is returned when nothing is there.
    """
    if not os.path.isfile(root / path):
        for number, (pattern, by) in enumerate(ARCHIVE_RULES):
            if (match := pattern.match(path)) and os.path.isfile(root / (by + path[match.end() :])):
                return by + path[match.end() :], number
    return path, None


def map_images(record: dict, move: Callable[[str], str]) -> dict:
    """The record with every image path replaced by what ``move`` makes of it."""

    def moved(image: object) -> object:
        if isinstance(image, list):
            return [moved(path) for path in image]
        return move(image) if isinstance(image, str) and image else image

    keys = ["image", "image_path"]
    if "completions" in record:  # in TRL's format
        keys.append("images")
    return record | {key: moved(record[key]) for key in keys if key in record}


def image_prefix(root: Path, out: Path) -> str:
    """The path that makes an image path from ``root`` start from ``out``'s folder."""
    return os.path.relpath(root.resolve(), out.resolve().parent)


def with_prefix(record: dict, prefix: str) -> dict:
    """The record with the prefix before its relative image paths, which stay whole after it."""
    if prefix == os.curdir:
        return record
    return map_images(record, partial(os.path.join, prefix))


class RecordWriter:
    """Writes ``<name>.jsonl`` and, beside it, ``<name>.rejected.jsonl``.

    A context manager: both files appear when the block ends well, neither when it does not. The
    counts are `num_written` and `num_rejected`.

    Args:
        inputs: files that are read meanwhile, and that neither file may replace.

    Raises:
        InputError: the name does not end in .jsonl, it is an input's, or a file is there and
            ``overwrite`` is false; at the end of the block: not a single record was written.
    """

    def __init__(
        self, path: str | Path, overwrite: bool = False, inputs: Iterable[Path] = ()
    ) -> None:
        self.path = Path(path)
        if self.path.suffix != ".jsonl":
            raise InputError(f"{self.path}: records are written as JSONL; end the name in .jsonl.")
        self.rejected_path = self.path.with_suffix(".rejected.jsonl")
        refuse_overwriting((self.path, self.rejected_path), inputs)
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
        source_id = None
        if isinstance(record, dict):
            source_id = with_source_id(record, file, line).get("id")
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
