"""Solutions as they are scored: those of one question together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dreamprm_dist.data.json_records import read_json_records
from dreamprm_dist.data.schema import Turn, parse_training_record, step_labels
from dreamprm_dist.errors import InputError, RecordError
from dreamprm_dist.evaluation.benchmarks.base import LabelledSolution
from dreamprm_dist.prm.solutions import steps_conversation

MOST_TOGETHER = 16  # solutions of one question that are one batch
TEST, THRESHOLD = "test", "threshold"  # sets of solutions


@dataclass(kw_only=True)
class Batch:
    """Solutions of one question that are scored together.

    Attributes:
        first: the index of the first among all solutions, or of the record in the threshold file.
        members: indices of all.
    """

    first: int
    members: list[int]
    file: str
    line: int
    images: list[str]
    conversations: list[list[Turn]]


class Key(NamedTuple):
    """A batch that a PRM scores; `first` and `size` say which solutions are in it."""

    prm: str
    set: str
    first: int
    size: int


@dataclass
class ThresholdSet:
    """Labelled solutions that thresholds are chosen on."""

    batches: list[Batch]
    labels: list[list[str | None]]


def read_threshold_set(file: str) -> ThresholdSet:
    """Training or meta records with their steps' labels; InputError with the line of a bad one."""
    found = ThresholdSet([], [])
    for line, raw in read_json_records(file):
        try:
            record = parse_training_record(raw)
        except RecordError as error:
            raise InputError(f"{file}, record {line}: {error}") from error
        if not any(labels := step_labels(record.conversations)):
            continue
        index = len(found.batches)
        found.labels.append(labels)
        found.batches.append(
            Batch(
                first=index,
                members=[index],
                file=file,
                line=line,
                images=record.images,
                conversations=[record.conversations],
            )
        )
    if len({label for labels in found.labels for label in labels} - {None}) < 2:
        raise InputError(
            f"{file}: no threshold can be chosen, there are not both right and wrong steps"
        )
    return found


def batches_of(solutions: Sequence[LabelledSolution]) -> Iterator[Batch]:
    """Solutions of one file, question and images together: what they share is computed once."""
    groups: dict[tuple, list[int]] = {}
    for index, solution in enumerate(solutions):
        shown = (solution.file, solution.question, *solution.images)
        groups.setdefault(shown, []).append(index)
    for group in groups.values():
        for start in range(0, len(group), MOST_TOGETHER):
            members = group[start : start + MOST_TOGETHER]
            first = solutions[members[0]]
            yield Batch(
                first=members[0],
                members=members,
                file=first.file,
                line=first.line,
                images=first.images,
                conversations=[
                    steps_conversation(solutions[i].question, solutions[i].steps) for i in members
                ],
            )


def scores_by_index(
    scored: Mapping[tuple, dict], label: str, name: str, batches: Sequence[Batch]
) -> dict[int, list[float] | str]:
    """By index of the solution its step scores, or why there are none."""
    found: dict[int, list[float] | str] = {}
    for batch in batches:
        row = scored[Key(label, name, batch.first, len(batch.members))]
        errors = [row.get("error", "")] * len(batch.members)
        found |= dict(zip(batch.members, row.get("scores", errors), strict=True))
    return found
