"""Training, meta and test records: what each must hold, checked record by record.

The ``parse_*`` functions see one record and not its file, so their messages say what is wrong
with the record; whoever knows the file and line puts them in front.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypedDict

from dreamprm_dist.errors import RecordError

IMAGE_PLACEHOLDER = "<image>"
QUESTION_PREFIX = "### Question:\n"
# In VisualPRM's format the first step follows it, in the question's own turn.
SOLUTION_MARK = "### Solution Process:"

# Functional syntax, as "from" is a keyword.
TextTurn = TypedDict("TextTurn", {"from": Literal["system", "human"], "value": str})
# A step's value is its label: "+", "-" or None, unlabelled.
_Label = TypedDict("_Label", {"from": Literal["gpt"], "value": str | None})


class StepTurn(_Label, total=False):
    """A step's label and, where they are known, the roll-outs from the step: both or neither.

    Attributes:
        num_mc_correct, num_mc_total: how many roll-outs ended with the right answer, of how many.
    """

    num_mc_correct: int
    num_mc_total: int


Turn = TextTurn | StepTurn


@dataclass
class TrainingRecord:
    """One solution with a label per step.

    Attributes:
        source_id: the file's own ``id`` as text; "" when absent, and it may repeat or be "-1".
        images: image paths as the file has them.
        conversations: turns with exactly the keys of `Turn`.
        dataset: the name of the data set, "" when absent.
    """

    source_id: str
    images: list[str]
    conversations: list[Turn]
    dataset: str = ""


@dataclass(kw_only=True)
class MetaRecord(TrainingRecord):
    """A training record that also says whether the solution's final answer is right.

    Attributes:
        true_false: whether it is.
        response: the solution's text, "" when absent.
    """

    true_false: bool
    response: str = ""


@dataclass
class TestRecord:
    """A question with N candidate solutions, and for each whether its final answer is right.

    Attributes:
        question: the question's text, with its options where it has any.
        images: image paths as the file has them.
        candidates, true_false: N solutions, and whether each one's final answer is right.
        id, subject, answer: as the file has them, "" when absent.
        options: the texts of the options, None when absent.
        step_labels: for each candidate the labels of its steps ("+", "-" or None), where known.
    """

    __test__ = False  # the name starts with "Test", but pytest must not collect it

    question: str
    images: list[str]
    candidates: list[str]
    true_false: list[bool]
    id: str = ""
    subject: str = ""
    answer: str = ""
    options: list[str] | None = None
    step_labels: list[list[str | None]] | None = None


def parse_training_record(record: object) -> TrainingRecord:
    """Check a training record and normalise it.

    Raises:
        RecordError: not an object, no step to score, a turn or label that is not understood, or
            ``<image>`` in the question that does not match the images.
    """
    record = require_object(record)
    _refuse_other_kind(record, "conversations", "training and meta records have 'conversations'")
    conversations = _parse_conversations(record.get("conversations"))
    images = _parse_images(record.get("image"), "image")
    parts_around_images(question_turn(conversations), len(images))
    return TrainingRecord(
        source_id=_parse_id(record.get("id")),
        images=images,
        conversations=conversations,
        dataset=_optional_text(record, "dataset"),
    )


def parse_meta_record(record: object) -> MetaRecord:
    """Check a meta record: a training record with ``true_false`` and optionally ``response``.

    Raises:
        RecordError: as `parse_training_record`, or ``true_false`` is not true or false.
    """
    record = require_object(record)
    base = parse_training_record(record)
    if "true_false" not in record:
        raise RecordError(
            "it is a training record; a meta record also has 'true_false', whether the solution's "
            "final answer is right."
        )
    if not isinstance(record.get("true_false"), bool):
        raise RecordError(
            f"'true_false' must be true or false, not {_shown(record.get('true_false'))}."
        )
    return MetaRecord(
        **vars(base),
        true_false=record["true_false"],
        response=_optional_text(record, "response"),
    )


def parse_test_record(record: object) -> TestRecord:
    """Check a Best-of-N test record; ``true_false`` is as long as ``candidates`` (length N >= 1).

    Raises:
        RecordError: a missing question, no candidates, lengths that differ, wrong types, or
            ``<image>`` in the question that does not match the images.
    """
    record = require_object(record)
    _refuse_other_kind(record, "candidates", "test records have 'question' and 'candidates'")
    question = _text(record.get("question"), "'question'")
    if not question.strip():
        raise RecordError("'question' is empty; every test record needs one.")
    candidates = record.get("candidates")
    if not isinstance(candidates, list) or not candidates:
        raise RecordError(f"'candidates' must be a non-empty list, not {_shown(candidates)}.")
    true_false = record.get("true_false")
    if not isinstance(true_false, list) or not all(isinstance(x, bool) for x in true_false):
        raise RecordError(
            f"'true_false' must be a list of true and false, not {_shown(true_false)}."
        )
    if len(true_false) != len(candidates):
        raise RecordError(
            f"'true_false' has {len(true_false)} entries for {len(candidates)} candidates; "
            "give one per candidate."
        )
    options = record.get("options")
    if options is not None and not isinstance(options, list):
        raise RecordError(f"'options' must be a list of texts, not {_shown(options)}.")
    images = _parse_images(record.get("image_path"), "image_path")
    parts_around_images(question, len(images))
    return TestRecord(
        question=question,
        images=images,
        candidates=[_solution(text, f"candidates[{i}]") for i, text in enumerate(candidates)],
        true_false=true_false,
        id=_parse_id(record.get("id")),
        subject=_optional_text(record, "subject"),
        answer=_optional_text(record, "answer"),
        options=options and [_text(text, f"options[{i}]") for i, text in enumerate(options)],
        step_labels=_parse_step_labels(record.get("step_labels"), len(candidates)),
    )


def parse_question_record(record: object) -> TestRecord:
    """Check a question record: a test record whose candidates may still be missing.

    Raises:
        RecordError: as `parse_test_record`.
    """
    no_candidates = {"candidates": [""], "true_false": [False]}
    return parse_test_record(no_candidates | require_object(record))


def parse_scoring_record(record: object) -> tuple[str, list[str], list[str | list[str]]]:
    """Check a record of solutions to score; returns question, image paths and solutions.

    The solutions are `candidates`, each a text or a list of steps, or the one of `steps`.

    Raises:
        RecordError: a missing question, neither or both of the two, no solution, or wrong types.
    """
    record = require_object(record)
    if "steps" not in record:
        _refuse_other_kind(
            record, "candidates", "give 'question' and either 'steps' or 'candidates'"
        )
    question = _text(record.get("question"), "'question'")
    if ("steps" in record) == ("candidates" in record):
        raise RecordError("give either 'steps' or 'candidates'.")
    solutions = [record["steps"]] if "steps" in record else record["candidates"]
    if not isinstance(solutions, list) or not solutions:
        raise RecordError(f"'candidates' must be a non-empty list, not {_shown(solutions)}.")
    if "steps" in record and not isinstance(record["steps"], list):
        raise RecordError(f"'steps' must be a list of texts, not {_shown(record['steps'])}.")
    texts: list[str | list[str]] = []
    for i, solution in enumerate(solutions):
        key = "steps" if "steps" in record else f"candidates[{i}]"
        if isinstance(solution, list):
            texts.append([_any_text(step, key) for step in solution])
        else:
            texts.append(_solution(solution, key))
    return question, _parse_images(record.get("image_path"), "image_path"), texts


def _parse_step_labels(value: object, num_candidates: int) -> list[list[str | None]] | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != num_candidates:
        raise RecordError(
            f"'step_labels' must be a list with one list per candidate, not {_shown(value)}."
        )
    for i, labels in enumerate(value):
        if not isinstance(labels, list) or any(x not in ("+", "-", None) for x in labels):
            raise RecordError(
                f"step_labels[{i}] must be a list of '+', '-' and null, not {_shown(labels)}."
            )
    return value


def require_object(record: object) -> dict:
    """The record, a JSON object; raises RecordError, that of `read_json_records` in its place."""
    if isinstance(record, RecordError):
        raise record
    if not isinstance(record, dict):
        raise RecordError(f"a record must be a JSON object, not {_shown(record)}.")
    return record


# By the first of these keys that they have: what records are, and which command takes them.
_KINDS = {
    "conversations": "a training or meta record, one solution with a label per step",
    "steps_with_score": "a raw record of VisualPRM400K, for `python -m data_tools.convert raw`",
    "completions": "a record of TRL's stepwise supervision, for "
    "`python -m data_tools.convert stepwise`",
    "labeler": "a record of PRM800K, for `python -m data_tools.convert prm800k`",
    "input": "a record of Math-Shepherd, for `python -m data_tools.convert math_shepherd`",
    "candidates": "a test record, a question with candidates, for launch/evaluate.py",
    "steps": "a solution without labels, for launch/score.py",
    "question": "a question without solutions, for `python -m data_tools.generate`, then "
    "`python -m data_tools.convert candidates`",
    "response": "a candidate, for `python -m data_tools.convert candidates` with its question",
}


def kind_of_record(record: dict) -> str | None:
    """What a record is, in words; None: not known."""
    return next((_KINDS[key] for key in _KINDS if key in record), None)


def _refuse_other_kind(record: dict, key: str, wanted: str) -> None:
    """Raise RecordError for a record that lacks a key and is of another kind."""
    if key not in record and (kind := kind_of_record(record)):
        raise RecordError(f"it is {kind}; {wanted}.")


def _parse_conversations(value: object) -> list[Turn]:
    if not isinstance(value, list) or not value:
        raise RecordError(f"'conversations' must be a non-empty list, not {_shown(value)}.")
    turns: list[Turn] = []
    for i, turn in enumerate(value):
        if not isinstance(turn, dict):
            raise RecordError(f"conversations[{i}] must be an object, not {_shown(turn)}.")
        speaker, text = turn.get("from"), turn.get("value")
        if speaker == "gpt":
            if not any(earlier["from"] == "human" for earlier in turns):
                raise RecordError(f"conversations[{i}]: a gpt turn comes before any human turn.")
            label = text.strip() if isinstance(text, str) else text
            if label is not None and label not in ("+", "-"):
                raise RecordError(
                    f"conversations[{i}]: a gpt turn must be '+', '-' or null, not {_shown(text)}."
                )
            step: StepTurn = {"from": speaker, "value": label}
            if counts := parse_counts(turn, f"conversations[{i}]"):
                step["num_mc_correct"], step["num_mc_total"] = counts
                if label is not None and not step["num_mc_total"]:
                    raise RecordError(
                        f"conversations[{i}]: no roll-out visited it ('num_mc_total' is 0), so its "
                        f"label must be null, not {_shown(label)}."
                    )
            turns.append(step)
        elif speaker in ("human", "system"):
            text = _text(text, f"conversations[{i}] ({speaker})")
            turns.append({"from": speaker, "value": text})
        else:
            raise RecordError(
                f"conversations[{i}]: 'from' must be system, human or gpt, not {_shown(speaker)}."
            )
    if turns and not any(turn["from"] == "gpt" for turn in turns):
        raise RecordError("'conversations' has no step: add a gpt turn ('+', '-' or null).")
    return turns


def parse_counts(turn: dict, what: str) -> tuple[int, int] | None:
    """A turn's roll-outs, right ones and all; None where it does not say.

    Raises:
        RecordError: one of the two, no whole numbers, or more right ones than there are.
    """
    correct, total = turn.get("num_mc_correct"), turn.get("num_mc_total")
    if correct is None and total is None:
        return None
    if correct is None or total is None:
        raise RecordError(f"{what}: give both 'num_mc_correct' and 'num_mc_total', or neither.")
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (correct, total))
    if not whole or not 0 <= correct <= total < 2**31:
        raise RecordError(
            f"{what}: 'num_mc_correct' and 'num_mc_total' must be whole numbers, the first from 0 "
            f"to the second, not {_shown(correct)} and {_shown(total)}."
        )
    return correct, total


def _parse_images(value: object, key: str) -> list[str]:
    values = [] if value is None else value if isinstance(value, list) else [value]
    paths = [_text(path, f"'{key}'") for path in values]
    if not all(path.strip() for path in paths):
        raise RecordError(f"'{key}' is an empty path; leave it out when there is no image.")
    return paths


def question_turn(turns: Iterable[Turn]) -> str:
    """The text of the turn that asks the question: the first human one, which must be there."""
    return next(turn["value"] for turn in turns if turn["from"] == "human")


def step_labels(turns: Iterable[Turn]) -> list[str | None]:
    """The label of each step, in order: "+", "-" or None."""
    return [turn["value"] for turn in turns if turn["from"] == "gpt"]


def step_counts(turns: Iterable[Turn]) -> list[tuple[int, int]]:
    """The roll-outs from each step, in order: (right ones, all), (0, 0) where none are known."""
    return [
        (turn.get("num_mc_correct", 0), turn.get("num_mc_total", 0))
        for turn in turns
        if turn["from"] == "gpt"
    ]


def relabelled(turns: Iterable[Turn], threshold: float) -> list[Turn]:
    """The turns, labelled anew: `+` where more than this part of a step's roll-outs were right.

    What has no label, or no roll-outs, stays as it is. It is what `data_tools.convert raw` gives
    with the same threshold.
    """
    new: list[Turn] = []
    for turn in turns:
        if turn["from"] == "gpt" and turn["value"] is not None and turn.get("num_mc_total"):
            is_plus = turn["num_mc_correct"] / turn["num_mc_total"] > threshold
            new.append({**turn, "value": "+" if is_plus else "-"})
        else:
            new.append(turn)
    return new


def parts_around_images(question: str, num_images: int) -> list[str]:
    """The text of a question's turn before, between and behind its N images: N + 1 parts.

    An image stands where the question says ``<image>``, or all stand before it where it never does.
    Without images, and behind `SOLUTION_MARK`, where VisualPRM's first step stands, it is text.

    Raises:
        RecordError: the question says ``<image>``, but not once for each image.
    """
    asked, mark, first_step = question.partition(SOLUTION_MARK)
    parts = asked.split(IMAGE_PLACEHOLDER) if num_images else [asked]
    if len(parts) == 1:
        parts = [""] * num_images + parts
    if len(parts) != num_images + 1:
        raise RecordError(
            f"the question has {len(parts) - 1} {IMAGE_PLACEHOLDER} for {num_images} image(s); "
            "use one per image, or none."
        )
    return [*parts[:-1], parts[-1] + mark + first_step]


def _parse_id(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return "" if value is None else _text(value, "'id'")


def _optional_text(record: dict, key: str) -> str:
    value = record.get(key)
    return "" if value is None else _text(value, f"'{key}'")


def _solution(value: object, what: str) -> str:
    """A solution's text; null, as servers say of a reply without text, is an empty one.

    Half a surrogate pair, as a reply that was cut within a character ends with, stays: it costs
    this solution's score, and not the question.
    """
    return "" if value is None else _any_text(value, what)


def _text(value: object, what: str) -> str:
    text = _any_text(value, what)
    if not is_unicode(text):
        raise RecordError(f"{what} holds half a surrogate pair; write it as valid Unicode.")
    return text


def _any_text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise RecordError(f"{what} must be text, not {_shown(value)}.")
    return value


def is_unicode(text: str) -> bool:
    """Whether a text can be stored and tokenized: JSON can spell half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: object) -> str:
    """A value for a message, cut so that a hostile one does not fill the screen."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
