"""The commands of `data_tools.convert` for what `stepwise_formats` reads and writes."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from pathlib import Path

from data_tools.dataset_files import read_rows
from data_tools.record_files import read_with_progress
from data_tools.stepwise_formats import (
    NEUTRAL,
    from_math_shepherd,
    from_prm800k,
    from_stepwise,
    to_stepwise,
)
from dreamprm_dist.flags import CommandParser

NAMES = ("stepwise", "prm800k", "math_shepherd", "to_stepwise")
_COLUMNS = {"stepwise": "completions", "prm800k": "label", "math_shepherd": "input"}


class Stepwise:
    """A command as it was asked for.

    Attributes:
        convert: from a record to one, or to several; it raises RecordError.
    """

    def __init__(self, args: argparse.Namespace):
        self._column = _COLUMNS.get(args.command)
        self._split: str | None = None if self._column is None else args.split
        self._cut: list[int] = []
        self.convert: Callable[[dict], dict | list[dict]]
        if args.command == "prm800k":
            self.convert = partial(
                from_prm800k,
                neutral=args.neutral,
                label_once=args.label_once,
                unfiltered=args.unfiltered,
            )
        elif args.command == "to_stepwise":
            self.convert = partial(to_stepwise, cut=self._cut)
        else:
            self.convert = from_stepwise if args.command == "stepwise" else from_math_shepherd

    def read(self, path: Path, limit: int | None) -> Iterable[tuple[str | Path, int, object]]:
        """File, line or row, and record of an input: JSON, a Parquet file or a folder of data."""
        if self._column and (path.is_dir() or path.suffix == ".parquet"):
            return islice(read_rows(path, self._split, self._column), limit)
        return ((path, line, record) for line, record in read_with_progress(path, limit))

    def said(self) -> str:
        """What is to be told beside the counts of records."""
        if not self._cut:
            return ""
        return (
            f", {sum(self._cut)} unlabelled steps cut off the ends of {len(self._cut)} of the "
            "solutions"
        )


def add(command: Callable[..., CommandParser], inputs: CommandParser) -> None:
    """Add the commands.

    Args:
        command: from name, help and parent to a command's parser.
        inputs: the parent with the flags of `convert_files`.
    """
    into = "to training records; JSON, JSONL, Parquet or a datasets folder"
    stepwise = command("stepwise", f"TRL's stepwise supervision {into}", inputs)
    prm800k = command("prm800k", f"OpenAI's PRM800K {into}", inputs)
    shepherd = command("math_shepherd", f"Math-Shepherd {into}", inputs)
    command("to_stepwise", "training records to TRL's stepwise supervision", inputs)
    for parser in (stepwise, prm800k, shepherd):
        parser.add_argument("--split", help="train, test, …; needed when a folder has several")
    prm800k.add_argument(
        "--neutral",
        choices=[*NEUTRAL],
        default="plus",
        help="what rating 0 is, neither wrong nor of use: plus (default), for what is asked is "
        "whether all is right so far; minus, as in TRL's copy; unlabelled",
    )
    prm800k.add_argument(
        "--label_once",
        action="store_true",
        help="label the steps that solutions share in one of them alone",
    )
    prm800k.add_argument(
        "--unfiltered",
        action="store_true",
        help="also take solutions that check or choose labelers, broken problems, and those that "
        "labelers gave up",
    )
