"""MMMU and MMMU-Pro, as downloaded, to question records; with candidates to meta and test records.

A question record is `{"id", "question", "image_path", "options", "answer", "question_type",
"subject"}`; its `question` is the text that the PRM sees, with the options.
"""

from __future__ import annotations

import hashlib
import os
import re
from itertools import islice
from pathlib import Path

from data_tools.dataset_files import read_rows
from data_tools.record_files import RecordWriter, image_prefix, with_prefix
from dreamprm_dist.data.images import decode_image
from dreamprm_dist.data.json_records import read_json_records
from dreamprm_dist.data.schema import (
    is_unicode,
    parse_meta_record,
    parse_test_record,
    require_object,
)
from dreamprm_dist.errors import RecordError
from dreamprm_dist.evaluation.answer_keys import UNKNOWN, normal_key, parse_options
from dreamprm_dist.evaluation.choices import LETTERS
from dreamprm_dist.evaluation.grading import grade
from dreamprm_dist.prm.solutions import split_steps, steps_conversation

IMAGE_COLUMNS = tuple(f"image_{i}" for i in range(1, 8))
_MMMU_ID = re.compile(r"(?:dev|validation|test)_(\w+)_\d+")  # validation_Art_Theory_12
_REFERENCE = re.compile(r"<image (\d+)>")


def write_questions(
    source: Path,
    out: Path,
    split: str | None = None,
    image_dir: Path | None = None,
    overwrite: bool = False,
    limit: int | None = None,
) -> RecordWriter:
    """Write the questions of a split of a data set, of its first ``limit`` rows.

    Images go to ``image_dir`` (by default ``<out>_images`` beside ``out``), named by the hash of
    their bytes; paths in the records start from ``out``'s folder.

    Raises:
        FileNotFoundError: no such source, or it holds no data.
        InputError: it has several splits and ``split`` chooses none of them, or no question texts.
    """
    image_dir = out.with_name(f"{out.stem}_images") if image_dir is None else image_dir
    prefix = image_prefix(image_dir, out)
    # Of a folder its data alone: the questions may be put into it.
    inputs = [source, *source.rglob("*.parquet"), *source.rglob("*.arrow")]
    writer = RecordWriter(out, overwrite, inputs)
    rows = islice(read_rows(source, split), limit)
    seen: dict[str, str] = {}
    with writer:
        image_dir.mkdir(parents=True, exist_ok=True)
        for file, line, row in rows:
            try:
                record = question_record(row, image_dir, prefix)
                if before := seen.get(record["id"]):
                    raise RecordError(f"this id came before, in {before}; an id is one question's.")
            except RecordError as error:
                writer.reject(file, line, row, str(error))
            else:
                seen[record["id"]] = file
                writer.write(record)
    return writer


def question_record(row: dict, image_dir: Path, prefix: str) -> dict:
    """One row as a question record; its images are written into ``image_dir``.

    Raises:
        RecordError: no id or question, options that `parse_options` cannot read, an answer that is
            none of them, an image that is broken, or an `<image n>` in the text without such an
            image.
    """
    for key in ("id", "question"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise RecordError(f"{key!r} must be a text.")
    options = parse_options(row.get("options"))
    if not options and row.get("question_type") == "multiple-choice":
        raise RecordError("it is a multiple-choice question without 'options'.")
    answer = row.get("answer")
    if answer != UNKNOWN:
        answer = normal_key(answer, options)
    question = f"Question: {row['question']}"
    if options:
        letters = zip(LETTERS, options, strict=False)
        question += "\n\nOptions: " + " ".join(f"({letter}) {text}" for letter, text in letters)
    present = {i for i, name in enumerate(IMAGE_COLUMNS, 1) if row.get(name) is not None}
    for number in map(int, _REFERENCE.findall(question)):
        if number not in present:
            raise RecordError(f"the text speaks of <image {number}>, and there is no such image.")
    images = [_image(row[IMAGE_COLUMNS[i - 1]], i) for i in sorted(present)]
    return {
        "id": row["id"],
        "question": question,
        "image_path": [os.path.join(prefix, _store(image_dir, *image)) for image in images],
        "options": options,
        "answer": answer,
        "question_type": row.get("question_type") or ("multiple-choice" if options else "open"),
        "subject": row.get("subject") or _subject_of(row["id"]) or row.get("subfield") or "",
    }


def _subject_of(question_id: str) -> str:
    """MMMU itself, unlike MMMU-Pro, names the subject in no column but in the id."""
    found = _MMMU_ID.fullmatch(question_id)
    return found[1].replace("_", " ") if found else ""


def _image(value: object, number: int) -> tuple[bytes, str]:
    """The image's bytes, and the ending that files of its format have."""
    data = value.get("bytes") if isinstance(value, dict) else None
    if not isinstance(data, bytes):
        raise RecordError(f"image_{number} holds no image bytes; download the data with images.")
    try:
        return data, str(decode_image(data).format).lower()
    except RecordError as error:
        raise RecordError(f"image_{number}: {error}") from error


def _store(image_dir: Path, data: bytes, ending: str) -> str:
    name = f"{hashlib.sha256(data).hexdigest()[:32]}.{ending}"
    path = image_dir / name
    if not path.exists() or path.stat().st_size != len(data):  # a killed run may have cut it
        path.write_bytes(data)
    return name


def join_candidates(
    questions: Path, candidates: Path, out: Path, kind: str, overwrite: bool = False
) -> tuple[RecordWriter, int]:
    """Join question records with their candidates into meta or test records.

    A candidate is ``{"id": of its question, "response": text, "true_false"?: bool}``. Without
    ``true_false`` it is graded by `grade`; one whose answer cannot be read is not right. An empty
    one stays in a test record, for a model gave it as its answer; it makes no meta record. The
    steps of meta records are unlabelled. Candidates are held in memory.

    Returns:
        The writer, and how many candidates have no answer that can be read.

    Raises:
        FileNotFoundError: a file is missing.
        InputError: ``out`` is taken, or nothing could be joined.
    """
    prefix = image_prefix(questions.parent, out)
    num_unparsed = 0
    with RecordWriter(out, overwrite, (questions, candidates)) as writer:
        by_question: dict[str, list[tuple[int, dict]]] = {}
        for line, raw in read_json_records(candidates):
            try:
                candidate = require_object(raw)
                if not isinstance(candidate.get("id"), str):
                    raise RecordError("'id' must be the question's id.")
            except RecordError as error:
                writer.reject(candidates, line, raw, str(error))
            else:
                if candidate.get("response", "") is None:  # a server's reply without text
                    candidate["response"] = ""
                by_question.setdefault(candidate["id"], []).append((line, candidate))
        for line, raw in read_json_records(questions):
            try:
                question = require_object(raw)
                found = by_question.pop(str(question.get("id")), [])
                if not isinstance(question.get("question"), str):
                    raise RecordError("'question' must be a text.")
                try:
                    question, flaw = _gradable(question), None
                except RecordError as error:
                    flaw = error
                try:  # whether it can be taken at all
                    _joined(question, [("Answer: A", False)], kind)
                except RecordError as error:
                    raise flaw or error from None
                judged = []
                for candidate_line, candidate in found:
                    try:
                        right = _is_right(candidate, question, flaw)
                        solution = (candidate["response"], bool(right))
                        _joined(question, [solution], kind)
                    except RecordError as error:
                        writer.reject(candidates, candidate_line, candidate, str(error))
                    else:
                        judged.append(solution)
                        num_unparsed += right is None
                if not judged:
                    what = "none of its candidates can be taken" if found else "it has no candidate"
                    raise flaw or RecordError(f"{what}.")
                for record in _joined(question, judged, kind):
                    writer.write(with_prefix(record, prefix))
            except RecordError as error:
                writer.reject(questions, line, raw, str(error))
        for left in by_question.values():
            for line, candidate in left:
                writer.reject(candidates, line, candidate, "no question has this id.")
    return writer, num_unparsed


def _gradable(question: dict) -> dict:
    """The question with its options and its answer as `grade` takes them."""
    answer, options = question.get("answer"), parse_options(question.get("options"))
    if answer in (None, UNKNOWN):
        raise RecordError("the question has no 'answer'; the candidate needs 'true_false'.")
    return question | {"options": options, "answer": normal_key(answer, options)}


def _is_right(candidate: dict, question: dict, flaw: RecordError | None) -> bool | None:
    response = candidate.get("response")
    if not isinstance(response, str):
        raise RecordError("'response' must be a text.")
    if not is_unicode(response):
        raise RecordError("'response' holds half a surrogate pair; write it as valid Unicode.")
    given = candidate.get("true_false")
    if isinstance(given, bool):
        return given
    if given is not None:
        raise RecordError("'true_false' must be true or false.")
    if flaw:
        raise flaw
    return grade(response, question["answer"], question["options"])


def _joined(question: dict, judged: list[tuple[str, bool]], kind: str) -> list[dict]:
    if kind == "test":
        record = {
            **question,
            "candidates": [response for response, _ in judged],
            "true_false": [right for _, right in judged],
        }
        parse_test_record(record)
        return [record]
    records = []
    for response, right in judged:
        if not (steps := split_steps(response)):
            raise RecordError("there is no step to learn from: 'response' is empty.")
        record = {
            "id": question.get("id"),
            "image": question.get("image_path"),
            "dataset": question.get("subject", ""),
            "conversations": steps_conversation(question["question"], steps),
            "true_false": right,
            "response": response,
        }
        parse_meta_record(record)
        records.append(record)
    return records
