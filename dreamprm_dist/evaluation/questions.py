"""Questions with candidate solutions, as evaluation takes them from test and meta files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dreamprm_dist.data.json_records import read_json_records
from dreamprm_dist.data.question_key import image_digests, question_key, question_text
from dreamprm_dist.data.schema import MetaRecord, Turn, parse_meta_record, parse_test_record
from dreamprm_dist.errors import InputError, RecordError
from dreamprm_dist.evaluation.answer_keys import parse_options
from dreamprm_dist.evaluation.grading import votes
from dreamprm_dist.prm.solutions import split_steps, steps_conversation


@dataclass(kw_only=True)
class Question:
    """A question and the conversations in which its N candidates are scored.

    Attributes:
        file, line: where it stands; the line, or the index in a list, counts from 1.
        conversations: of each candidate; one whose text is empty has no step in it.
        answers: the candidates' `votes`: of multiple choice the letters; None where there is none.
        step_labels: for each candidate the label of each step, None where steps have no labels.
    """

    file: str
    line: int
    id: str
    subject: str
    images: list[str]
    conversations: list[list[Turn]]
    answers: list[str | None]
    true_false: list[bool]
    step_labels: list[list[str | None]] | None = None


class Rejected(NamedTuple):
    """A record that is not taken, as `rejected.jsonl` lists it."""

    line: int
    id: object
    reason: str


def read_test_questions(path: str) -> Iterator[Question | Rejected]:
    """Yield each record of a test file, as a question where it can be taken."""
    for line, raw in read_json_records(path):
        try:
            yield _test_question(path, line, raw)
        except RecordError as error:
            yield Rejected(line, raw.get("id") if isinstance(raw, dict) else None, str(error))


def _test_question(path: str, line: int, raw: dict | RecordError) -> Question:
    record = parse_test_record(raw)
    steps = [split_steps(solution) for solution in record.candidates]
    for index, labels in enumerate(record.step_labels or []):
        if len(labels) != len(steps[index]):
            raise RecordError(
                f"step_labels[{index}] has {len(labels)} labels for {len(steps[index])} steps; "
                "steps are separated by blank lines, numbered lines and 'Answer:'."
            )
    return Question(
        file=path,
        line=line,
        id=record.id,
        subject=record.subject,
        images=record.images,
        conversations=[steps_conversation(record.question, solution) for solution in steps],
        answers=votes(record.candidates, record.options or _written_options(record.question)),
        true_false=record.true_false,
        step_labels=record.step_labels,
    )


def _written_options(question: str) -> list[str]:
    """The options that a question's text ends with, as MMMU's prompts do; none elsewhere."""
    _, heading, text = question.rpartition("\nOptions:")
    try:
        return parse_options(text) if heading else []
    except RecordError:
        return []


def read_meta_questions(path: str, image_root: Path) -> list[Question]:
    """The questions of a meta file, each with all solutions that the file holds of it.

    Records belong to one question when they have one `question_key`, as in shards.

    Raises:
        InputError: a record that cannot be taken, or that shows other images than the records of
            its question before it; the line is named. No question has more than one solution, so
            that there is nothing to choose.
    """
    groups: dict[str, list[tuple[int, MetaRecord]]] = {}
    for line, raw in read_json_records(path):
        try:
            record = parse_meta_record(raw)
            members = groups.setdefault(question_key(record, image_root), [])
            members.append((line, record))
            first_line, first = members[0]
            if record.images != first.images and (
                image_digests(record, image_root) != image_digests(first, image_root)
            ):
                raise RecordError(
                    f"it has the id {record.source_id!r} of record {first_line}, but shows other "
                    "images; give each question an id of its own, or all records the id -1"
                )
        except RecordError as error:
            raise InputError(f"{path}, record {line}: {error}") from error
    if not groups:
        raise InputError(
            f"{path} holds no record; give meta records, several solutions per question"
        )
    if max(map(len, groups.values())) == 1:
        raise InputError(
            f"{path} holds one solution per question, and every aggregation picks that one; give "
            "several solutions of a question one id, or no id and the same images and text"
        )
    return [
        Question(
            file=path,
            line=line,
            id=first.source_id,
            subject=first.dataset,
            images=first.images,
            conversations=[record.conversations for _, record in members],
            answers=votes(
                [record.response for _, record in members],
                _written_options(question_text(first)),
            ),
            true_false=[record.true_false for _, record in members],
        )
        for members in groups.values()
        for line, first in members[:1]
    ]
