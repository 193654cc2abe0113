"""Options and answer keys of questions, in the forms in which public files write them."""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
from collections.abc import Sequence
from itertools import pairwise

from dreamprm_dist.errors import RecordError
from dreamprm_dist.evaluation.answers import read
from dreamprm_dist.evaluation.choices import (
    LETTERS,
    only_letter,
    options_with_text,
    plain_options,
    split_label,
    without_labels,
)

UNKNOWN = "?"  # the test split of MMMU is published with it for every answer
_MAX_CHARS = 100_000  # of a text that spells a list

_ARRAY = re.compile(r"(?:np\.|numpy\.)?array\((\[.*\])(?:,\s*dtype=[\w'\"<>|.]+)?\)", re.DOTALL)
# What JSON and Python would read as control characters, where a list's LaTeX has one backslash.
_LATEX = re.compile(
    r"(?<!\\)(?:\\\\)*\\(?=(?:[abfrtv]|u(?![\da-fA-F]{4}))[a-z]{2}|n(?:u|eq?|eg|abla)(?![a-z]))"
)
_HEADING = re.compile(r"\A(?:options|choices)\s*:\s*", re.IGNORECASE)
_LABELS = tuple(
    re.compile(
        rf"{start}([(（]?)([A-Za-z])(?:([.:])(?:\s+|(?=[^\x00-\x7f]))|([)、．：）])\s*)",
        re.MULTILINE,
    )
    for start in ("^[ ]*", r"(?<!\S)")
)
_ITEM = re.compile(r"^(?:[-*•]|\d{1,2}[.)])\s+(?=\S)")
_LABEL_KEYS = ("label", "key", "letter", "id")
_TEXT_KEYS = ("text", "content", "value", "option")


def parse_options(value: object) -> list[str]:
    """The texts of a question's options in the order of their letters; empty: an open question.

    Args:
        value: a list of texts, or of objects with a label and a text; an object of texts by letter,
            or of a list of labels and one of texts (as ARC has); or a text that spells one of these
            for Python, JSON or numpy, or has an option on each line, or letters: `(A) x (B) y`.
            Letters in front of all options in their order (`A. x`) are taken off.

    Raises:
        RecordError: anything else, or more options than letters.
    """
    if isinstance(value, str):
        value = _spelled(value.strip())
    texts = [] if value is None else _texts(value)
    if len(texts) > len(LETTERS):
        raise RecordError(f"'options' has {len(texts)} entries; there are 26 letters.")
    labels = [split_label(text)[0] for text in texts]
    if len(texts) > 1 and sorted(labels) == list(LETTERS[: len(texts)]) != labels:
        raise RecordError("'options' have letters of their own in another order than A, B, C.")
    return without_labels(texts)


def read_key(answer: object, options: Sequence[str]) -> list[str]:
    """The accepted answers: letters where there are options, else texts.

    Args:
        answer: of a choice a letter or an option's text, with or without the letter before it, in
            any case and brackets; of an open question a text or number. A list, real or spelled in
            a text, holds several that are accepted (in MMMU's evaluation too).

    Raises:
        RecordError: it is no answer to the question, or to more than one of its options.
    """
    accepted = _accepted(answer)
    if not accepted or not all(text.strip() for text in accepted):
        raise RecordError("'answer' is empty.")
    if not options:
        return accepted
    texts = plain_options(options)
    return list(dict.fromkeys(_key_letter(text, texts) for text in accepted))


def normal_key(answer: object, options: Sequence[str]) -> str:
    """The key as records hold it: one text, several as a list spelled in a text.

    Raises:
        RecordError: as `read_key`.
    """
    accepted = read_key(answer, options)
    return accepted[0] if len(accepted) == 1 else str(accepted)


def _key_letter(answer: str, texts: Sequence[str]) -> str:
    letters = LETTERS[: len(texts)]
    text = " ".join(read(answer).text.split())
    if letter := only_letter(text, letters):
        return letter
    found = options_with_text(text, texts)
    label, rest = split_label(text)
    if not found and label and label in letters:
        rest = rest.strip(" -=>|")
        found = [label] if not rest or label in options_with_text(rest, texts) else []
    if not found:
        raise RecordError(
            f"the answer {answer[:100]!r} is none of the {len(texts)} options; give a letter from "
            f"A to {letters[-1]}, or an option's text."
        )
    if len(found) > 1:
        raise RecordError(
            f"the answer {answer[:100]!r} is the text of the options {' and '.join(found)}; "
            "give the letter."
        )
    return found[0]


def _accepted(answer: object) -> list[str]:
    if isinstance(answer, str):
        if answer.lstrip().startswith("["):
            try:
                spelled = _literal(answer.strip())
            except RecordError:
                return [answer]  # a text such as [0, 1)
            if isinstance(spelled, list) and all(isinstance(text, str) for text in spelled):
                return spelled
        return [answer]
    values = list(answer) if isinstance(answer, list | tuple) else [answer]
    if not all(map(_is_text_or_number, values)):
        raise RecordError("'answer' must be a text, or a list of texts that are all right.")
    return [str(x) for x in values]


def _is_text_or_number(value: object) -> bool:
    """Whether a value can be an answer; NaN is what pandas writes for none."""
    is_one = isinstance(value, str | int | float) and not isinstance(value, bool)
    return is_one and value == value


def _spelled(text: str) -> object:
    if len(text) > _MAX_CHARS:
        raise RecordError(f"'options' has more than {_MAX_CHARS} characters.")
    if not text:
        return None
    if lettered := _lettered(_HEADING.sub("", text)):
        return lettered
    if array := _ARRAY.fullmatch(text):
        text = array[1]
    if text[0] in "[({":
        return _literal(_LATEX.sub(r"\g<0>\\", text))
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if len(lines) < 2:
        raise RecordError(
            "'options' is not the text of a Python list, nor are there lines or letters in it."
        )
    marked = all(map(_ITEM.match, lines))
    return [_ITEM.sub("", line, count=1) for line in lines] if marked else lines


def _lettered(text: str) -> list[str]:
    """The parts behind `A.`, `B.`, … (or `(a)`, `A)`, `A:`), at best at the starts of lines."""
    for place in _LABELS:
        marks: list[re.Match] = []
        style = ""
        for mark in place.finditer(text):
            letter, around = mark[2], f"{mark[1]}{mark[3]}{mark[2].isupper()}"
            if letter.upper() == LETTERS[len(marks) : len(marks) + 1] and style in ("", around):
                marks.append(mark)
                style = around
        if len(marks) > 1 and not marks[0].start():
            ends = [*(mark.start() for mark in marks[1:]), len(text)]
            parts = [text[m.end() : end].strip() for m, end in zip(marks, ends, strict=True)]
            if all(part.endswith((",", ";")) for part in parts[:-1]):
                parts = [part.rstrip(",;") for part in parts]
            return parts
    return []


def _literal(text: str) -> object:
    """What a text spells in JSON or Python; texts with no comma between are numpy's list."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        tokens = [
            token
            for token in tokenize.generate_tokens(io.StringIO(text).readline)
            if token.string.strip()
        ]
        words = [token.string for token in tokens]
        are_texts = [token.type == tokenize.STRING for token in tokens]
        if any(a and b for a, b in pairwise(are_texts)):
            if (words[0], words[-1]) != ("[", "]") or not all(are_texts[1:-1]):
                raise RecordError("'options' has texts with no comma between them.")
            return [ast.literal_eval(word) for word in words[1:-1]]
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError) as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError("'options' is not the text of a Python list.") from error


def _texts(value: object) -> list[str]:
    if isinstance(value, dict):
        return _by_label(value)
    items = list(value) if isinstance(value, list | tuple) else [value]
    pairs = [_pair(item) for item in items if isinstance(item, dict)]
    if pairs and len(pairs) == len(items):
        return _ordered([label for label, _ in pairs], [text for _, text in pairs])
    texts = [item for item in items if isinstance(item, str)]
    if len(texts) < len(items):
        raise RecordError("'options' must be a list of texts.")
    return texts


def _by_label(value: dict) -> list[str]:
    for key in _TEXT_KEYS:
        if isinstance(texts := value.get(key), list):
            labels = next((value[k] for k in _LABEL_KEYS if isinstance(value.get(k), list)), None)
            return _ordered(labels or [None] * len(texts), texts)
    filled = {label: text for label, text in value.items() if text is not None}
    return _ordered(list(filled), list(filled.values()))


def _pair(item: dict) -> tuple[object, object]:
    if len(item) == 1:
        return next(iter(item.items()))
    label = next((item[key] for key in _LABEL_KEYS if key in item), None)
    return label, next((item[key] for key in _TEXT_KEYS if key in item), None)


def _ordered(labels: Sequence[object], texts: Sequence[object]) -> list[str]:
    """The texts in the order of their labels A, B, … or 1, 2, …; as they are without labels."""
    names = [str(label).strip(" ().").upper() for label in labels]
    if all(label is None or label in _TEXT_KEYS for label in labels):
        names = [str(i) for i in range(1, len(texts) + 1)]
    for order in (list(LETTERS), [str(i) for i in range(1, len(texts) + 1)]):
        if len(names) == len(texts) and sorted(names) == sorted(order[: len(names)]):
            by_name = dict(zip(names, texts, strict=True))
            return _texts([by_name[name] for name in order[: len(names)]])
    raise RecordError(f"'options' has the labels {names[:30]}; they must be A, B, C and so on.")
