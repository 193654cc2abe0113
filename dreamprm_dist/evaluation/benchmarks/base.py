"""What a benchmark of step labels is: how its records are read, and how PRMs are measured on it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeGuard

import numpy as np

from dreamprm_dist.data.json_records import read_json_records
from dreamprm_dist.data.schema import is_unicode, parts_around_images, require_object
from dreamprm_dist.errors import RecordError

# Name -> values of shape (...): the metrics of one row of a benchmark's table.
Metrics = dict[str, np.ndarray]


@dataclass(kw_only=True)
class LabelledSolution:
    """A solution and what people say of its steps.

    Attributes:
        id: the record's own, "" where it has none.
        group: what the benchmark's table has rows for: a data source, subset or category.
        images: paths as the file has them.
        labels: `+`, `-` or None (not judged) for each step.
        cluster: solutions of one cluster, about the same images or problem, are not independent.
        key: a record of the same key as one before it is a repetition; None: none is.
        num_stray_marks: marks of the record that no step belongs to, and that so mean nothing.
        file, line: where it stands; the line, or the index in a list, counts from 1.
    """

    id: str
    group: str
    question: str
    steps: list[str]
    labels: list[str | None]
    cluster: Hashable
    images: list[str]
    key: Hashable = None
    num_stray_marks: int = 0
    file: str = ""
    line: int = 0


class RejectedSolution(NamedTuple):
    """A record that is not taken, as `rejected.jsonl` lists it."""

    file: str
    line: int
    id: str
    reason: str


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: one entry of `BENCHMARKS`.

    Attributes:
        title: its name as its paper writes it.
        paper: arXiv identifier.
        parse: a record and its file's name to a solution; RecordError for one that is not taken.
        outcomes: from the labels and scores of a solution what is counted, see `counts.Outcomes`.
        measure: from counts of shape (..., G, 4) and the names of the G groups the rows of the
            table; the first one stands for the PRM.
        groups: what a group is called.
        metrics: heading of each metric.
        headline: the metric that stands for a row.
    """

    title: str
    paper: str
    parse: Callable[[dict, str], LabelledSolution]
    outcomes: Callable[[Sequence[str | None], Sequence[float]], Iterable[tuple[int, float, float]]]
    measure: Callable[[np.ndarray, Sequence[str]], list[tuple[str, Metrics]]]
    groups: str
    metrics: dict[str, str]
    headline: str


def read_solutions(
    benchmark: Benchmark, files: Sequence[str], limit: int | None = None
) -> Iterator[LabelledSolution | RejectedSolution]:
    """Yield each record of a benchmark's files, as a solution where it can be taken.

    Args:
        limit: only the first records of each file.

    Raises:
        FileNotFoundError, RecordError: as `read_json_records`.
    """
    first: dict[Hashable, LabelledSolution] = {}
    for file in files:
        for line, record in islice(read_json_records(file), limit):
            try:
                solution = benchmark.parse(require_object(record), file)
                parts_around_images(solution.question, len(solution.images))
                solution.file, solution.line = file, line
                if solution.key is not None:
                    before = first.setdefault(solution.key, solution)
                    if before is not solution:
                        raise RecordError(f"it repeats record {before.line} of {before.file}.")
                yield solution
            except RecordError as error:
                source_id = "" if isinstance(record, RecordError) else record_id(record)
                yield RejectedSolution(file, line, source_id, str(error))


def record_id(record: dict) -> str:
    """The id of a record, under either of its names; "" where there is none."""
    value = record.get("id", record.get("idx"))
    return "" if value is None else str(value)


def text(record: dict, key: str, default: str | None = None) -> str:
    """A text of a record; RecordError where there is none, unless there is a default."""
    value = record.get(key, default)
    if value is None and default is not None:
        value = default
    if not isinstance(value, str) or not is_unicode(value):
        raise RecordError(f"{key!r} must be a text in valid Unicode.")
    return value


def texts(record: dict, key: str) -> list[str]:
    """Texts of a record, at least one, without the white space around each."""
    values = record.get(key)
    if not isinstance(values, list) or not values:
        raise RecordError(f"{key!r} must be a list of texts, and not empty.")
    if not all(isinstance(value, str) and is_unicode(value) for value in values):
        raise RecordError(f"{key!r} must hold texts in valid Unicode alone.")
    if not any(map(str.strip, values)):
        raise RecordError(f"{key!r} holds no text at all.")
    return [value.strip() for value in values]


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value of JSON is a whole number; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def file_stem(file: str) -> str:
    """A file's name without its ending."""
    return Path(file).name.partition(".")[0]
