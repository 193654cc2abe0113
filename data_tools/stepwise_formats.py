"""Solutions with step labels as other trainers and data sets write them, and back.

TRL's stepwise supervision (`prompt`, `completions`, `labels`), PRM800K of OpenAI (Lightman et al.,
arXiv:2305.20050; fields by the README of github.com/openai/prm800k) and Math-Shepherd (Wang et al.,
arXiv:2312.08935; by its data card), each record by record.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from dreamprm_dist.data.schema import (
    QUESTION_PREFIX,
    SOLUTION_MARK,
    parse_training_record,
    question_turn,
    step_labels,
)
from dreamprm_dist.errors import RecordError
from dreamprm_dist.prm.solutions import steps_conversation

STEP_MARK = "ки"  # Math-Shepherd's, at the end of each step
_FIRST_STEP = re.compile(r"\bstep 1\s*:", re.IGNORECASE)
_LATER_STEP = re.compile(r"\s*step (?!1\s*:)\d+\s*:", re.IGNORECASE)
NEUTRAL = {"plus": "+", "minus": "-", "unlabelled": None}
_NO_SOLUTION = {
    "bad_problem": "the labeler reported the problem as broken",
    "give_up": "the labeler was stuck and gave up",
}
_CHECKS = {
    "is_quality_control_question": "a solution that every labeler was given, as a check of them",
    "is_initial_screening_question": "a solution by which labelers were chosen",
}


def from_stepwise(record: dict) -> dict:
    """A record of TRL's stepwise supervision as a training record.

    True and 1 are ``+``, false and 0 are ``-``, null is unlabelled. ``id`` and ``dataset`` stay,
    and a list ``images`` of paths becomes ``image``.

    Raises:
        RecordError: no prompt, no steps, a step without text, or not a label for each step.
    """
    steps, given = record.get("completions"), record.get("labels")
    if not isinstance(steps, list) or not steps:
        raise RecordError("'completions' must be a non-empty list of steps.")
    if not isinstance(given, list) or len(given) != len(steps):
        count = len(given) if isinstance(given, list) else "no"
        raise RecordError(f"'labels' has {count} entries for {len(steps)} completions; give each.")
    labels = []
    for i, label in enumerate(given):
        if label not in (True, False, None):
            raise RecordError(f"labels[{i}] must be true, false or null, not {label!r:.40}.")
        labels.append(None if label is None else "+" if label else "-")
    texts = [_text(step, f"completions[{i}]") for i, step in enumerate(steps)]
    return _training_record(record, _text(record.get("prompt"), "'prompt'"), texts, labels)


def from_prm800k(
    record: dict, neutral: str = "plus", label_once: bool = False, unfiltered: bool = False
) -> list[dict]:
    """A line of PRM800K as training records, one for each solution that it holds.

    The path that was followed takes at each step the chosen completion, or what the labeler wrote
    in place of all, which is ``+``. It is a record, and so is each other completion with a label,
    behind the steps before it. A path that ends before completions of which none was chosen is part
    of theirs and no record of its own. Rating 1 is ``+``, -1 is ``-``; a step without a rating or
    that the labeler flagged as one they cannot label is unlabelled.

    Args:
        neutral: what rating 0 is, neither wrong nor of use: of `NEUTRAL`.
        label_once: the steps before another completion are unlabelled there, and the path is a
            record in any case: so each rating is learned from once.
        unfiltered: take what checks or chooses labelers, broken problems and those given up.

    Raises:
        RecordError: it is one of these, it has no question or no step, or a step or rating that is
            not understood.
    """
    question, label = record.get("question"), record.get("label")
    if not isinstance(question, dict) or not isinstance(label, dict):
        raise RecordError("'question' and 'label' must be objects, as PRM800K has them.")
    problem = _text(question.get("problem"), "question.problem")
    steps = label.get("steps")
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise RecordError("label.steps must be a list of objects.")
    if not unfiltered:
        flaws = [what for key, what in _CHECKS.items() if record.get(key)]
        flaws += filter(None, [_NO_SOLUTION.get(str(label.get("finish_reason")))])
        if flaws:
            raise RecordError(f"{flaws[0]}; --unfiltered takes it.")
    solutions = list(_prm800k_solutions(steps, NEUTRAL[neutral], label_once))
    if not solutions:
        raise RecordError("label.steps has no step that was rated or written.")
    return [
        _training_record(record, problem, [text for text, _ in steps], [sign for _, sign in steps])
        for steps in solutions
    ]


Step = tuple[str, str | None]  # text and label


def _prm800k_solutions(
    steps: Sequence[dict], neutral: str | None, label_once: bool
) -> Iterator[list[Step]]:
    path: list[Step] = []
    continued = False
    for i, step in enumerate(steps):
        completions, human = step.get("completions") or [], step.get("human_completion")
        if not isinstance(completions, list) or not all(isinstance(c, dict) for c in completions):
            raise RecordError(f"label.steps[{i}].completions must be a list of objects.")
        chosen = step.get("chosen_completion")
        if chosen is not None and chosen not in range(len(completions)):
            raise RecordError(
                f"label.steps[{i}].chosen_completion is {chosen!r:.20}, but there are "
                f"{len(completions)} completions."
            )
        before = [(text, None) for text, _ in path] if label_once else path
        for k, completion in enumerate(completions):
            rated = _rated(completion, neutral, f"label.steps[{i}].completions[{k}]")
            if k == chosen:
                taken = rated
            elif rated[1] is not None:
                continued = True
                yield [*before, rated]
        if chosen is None:
            if human is None:
                break
            text = human.get("text") if isinstance(human, dict) else human
            taken = _text(text, f"label.steps[{i}].human_completion"), "+"
        path.append(taken)
        continued = False
    if path and (label_once or not continued):
        yield path


def _rated(completion: dict, neutral: str | None, where: str) -> Step:
    rating = completion.get("rating")
    if isinstance(rating, bool) or rating not in (1, 0, -1, None):
        raise RecordError(f"{where}.rating must be 1, 0, -1 or null, not {rating!r:.40}.")
    signs = {1: "+", 0: neutral, -1: "-", None: None}
    label = None if completion.get("flagged") else signs[rating]
    return _text(completion.get("text"), f"{where}.text"), label


def from_math_shepherd(record: dict) -> dict:
    """A record of Math-Shepherd as a training record.

    ``input`` is the question and, from ``Step 1:`` on, its steps, each with `STEP_MARK` at its end;
    ``label`` is the same text with ``+`` or ``-`` in place of the marks. So a mark that ``label``
    has too is text. Where no ``Step 1:`` says so, the question ends with its only question mark.
    A mark within the question says nothing of a step. Steps behind the last mark are unlabelled.
    ``task`` becomes ``dataset``.

    Raises:
        RecordError: ``label`` is another text than ``input``, or where the question ends is not
            known.
    """
    text, labelled = record.get("input"), record.get("label")
    if not isinstance(text, str) or not isinstance(labelled, str):
        raise RecordError("'input' and 'label' must be texts.")
    steps = _marked(text, labelled)
    first, start = _first_step(steps)
    question = "".join(part for part, _ in steps[:first]) + steps[first][0][:start]
    steps[first] = steps[first][0][start:], steps[first][1]
    steps = steps[first:]
    if not steps[0][0].strip():  # the question's own mark
        del steps[0]
    if not steps:
        raise RecordError("'input' has no step.")
    texts = [_text(part, f"step {i}") for i, (part, _) in enumerate(steps, start=1)]
    if isinstance(task := record.get("task"), str) and task:
        record = record | {"dataset": task}
    return _training_record(
        record, _text(question, "the question"), texts, [sign for _, sign in steps]
    )


def _first_step(parts: Sequence[Step]) -> tuple[int, int]:
    """The part in which the first step begins, and where in it."""
    for number, (part, _) in enumerate(parts):
        # What a later step says of the first is no beginning.
        if not _LATER_STEP.match(part) and (found := list(_FIRST_STEP.finditer(part))):
            return number, found[-1].start()
    text, _ = parts[0]
    if text.count("?") != 1:
        raise RecordError(
            "nothing says where the question ends: it has no 'Step 1:', and not one question mark "
            "before the first step mark."
        )
    return 0, text.index("?") + 1


def _marked(text: str, labelled: str) -> list[Step]:
    """The parts of Math-Shepherd's text that end in a mark, each with its sign.

    What is behind the last mark has its sign where `labelled` ends in one, and else none.
    """
    *pieces, rest = text.split(STEP_MARK)
    parts: list[Step] = []
    place, part = 0, ""
    for piece in pieces:
        part += piece
        place += len(piece)
        sign = labelled[place : place + 1]
        if not labelled.startswith(piece, place - len(piece)) or not (
            sign in ("+", "-") or labelled.startswith(STEP_MARK, place)
        ):
            raise RecordError(f"'label' is not the text of 'input' in step {len(parts) + 1}.")
        if sign in ("+", "-"):
            parts.append((part, sign))
            part, place = "", place + 1
        else:
            part, place = part + STEP_MARK, place + len(STEP_MARK)
    end, rest = labelled[place:].rstrip(), rest.rstrip()
    last = end.removeprefix(rest).strip()
    if not end.startswith(rest) or last not in ("", "+", "-") or (last and not part + rest):
        raise RecordError("'label' is not the text of 'input' behind the last step mark.")
    if (part + rest).strip():
        parts.append((part + rest, last or None))
    return parts or [("", None)]


def to_stepwise(record: dict, cut: list[int] | None = None) -> dict:
    """A training record as one of TRL's stepwise supervision, which has a label for each step.

    Unlabelled steps at the end are cut off; one before a labelled step has no place there.
    ``id`` and ``dataset`` stay, image paths are a list ``images``, and the system prompt goes.

    Args:
        cut: the number of steps that were cut is appended, if any.

    Raises:
        RecordError: no training record, a step without text, no label at all, or an unlabelled step
            before a labelled one.
    """
    parsed = parse_training_record(record)
    labels = step_labels(parsed.conversations)
    question, mark, first_step = question_turn(parsed.conversations).partition(SOLUTION_MARK)
    steps: list[str] = []
    texts, asked = [first_step] if mark else [], False
    for turn in parsed.conversations:
        if turn["from"] == "gpt":
            steps.append(_text("\n".join(texts), f"step {len(steps) + 1}"))
            texts = []
        elif turn["from"] == "human":
            texts += [turn["value"]] if asked else []
            asked = True
    while labels and labels[-1] is None:
        labels.pop()
    if None in labels or not labels:
        where = f"step {labels.index(None) + 1} of {len(steps)}" if labels else "every step"
        raise RecordError(f"{where} is unlabelled, and TRL's format has no word for that.")
    if cut is not None and len(labels) < len(steps):
        cut.append(len(steps) - len(labels))
    named = {"id": record.get("id"), "dataset": parsed.dataset, "images": parsed.images}
    return {
        **{key: value for key, value in named.items() if value not in (None, "", [])},
        "prompt": _text(question.strip().removeprefix(QUESTION_PREFIX), "the question"),
        "completions": steps[: len(labels)],
        "labels": [label == "+" for label in labels],
    }


def _text(value: object, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise RecordError(f"{what} must be a text that is not empty.")
    return value.strip()


def _training_record(
    record: dict, question: str, steps: Sequence[str], labels: Sequence[str | None]
) -> dict:
    """A checked training record, with what it keeps of the record that it was made of."""
    images = record.get("images", record.get("image"))
    made: dict = {"id": -1 if record.get("id") is None else record["id"]}
    if images:
        made["image"] = images
    made |= {"dataset": record["dataset"]} if record.get("dataset") else {}
    made["conversations"] = steps_conversation(question, steps, labels=labels)
    parse_training_record(made)
    return made
