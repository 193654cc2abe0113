"""Whether a solution's final answer is right, by MMMU's published rules made deterministic.

The rules are those of MMMU's own evaluation (Yue et al., arXiv:2311.16502) and of MMMU-Pro's
(arXiv:2409.02813). They differ here on purpose:

- an answer that cannot be parsed is "unparsed" (None), never a random choice;
- what follows the last `Answer:` is the answer, and the reasoning before it is not searched when
  nothing can be made of it;
- several options there (`(A) or (B)`) are no answer; without `Answer:` the last one counts, as in
  MMMU;
- `the answer is B`, `\\boxed{B}` and, after `Answer:`, a small letter or `B.` count;
- the article "A" and the pronoun "I" are no options, and an empty option is never found;
- texts are found as whole words: neither `10` in `100` nor `red` in `colored`, and what follows
  the `is` of `Paris` is no answer;
- numbers below 0.005, which all round to 0.00, are compared to 1 %; `5kg` is the number 5 and
  `CO2` is none; nan and inf are words.
"""

import ast
import math
import re
from collections.abc import Sequence

from dreamprm_dist.prm.solutions import answer_line

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MAX_LITERAL = 10_000  # characters of an answer that is read as a Python list

_WRAPPERS = (  # what stands around an answer and is not part of it
    re.compile(r"\*+(.*?)\*+"),
    re.compile(r"\$+(.*?)\$+"),
    re.compile(r"\\boxed\{(.*)\}"),
    re.compile(r"\\text\{(.*)\}"),
    re.compile(r"\(([^()]*)\)"),
    re.compile(r"[\"'“‘](.*)[\"'”’]"),
)
_STATED = re.compile(
    r"(?:\b(?:answer|option|choice)(?:\s+(?:is|would\s+be))?\s*:?\s*(?:option\s+)?"
    r"|\\boxed\{(?:\\text\{)?)\**\(?([A-Z])(?![\w'’])",
    re.IGNORECASE,
)
_LABEL = re.compile(r"(?:option\s+)?([A-Z])[.):](?:\s|$)")
_IN_BRACKETS = re.compile(r"\(([A-Z])\)")
# Alone between spaces; not the article of "A cat", nor the pronoun, but "A and B".
_ALONE = re.compile(r"(?<!\S)([A-Z])(?=[.,;:!?]*(?:\s|$))(?!(?<=[AI])\s+(?!and\b|or\b)[a-z])")
_CONTENT_WORDS = 5  # MMMU looks for an option's text in responses that have more words than this
_KEYS = tuple(
    re.compile(rf"(?<!\w){key} ")
    for key in ("could be", "so", "is", "thus", "therefore", "final", "answer", "result")
)
_EQUALS = re.compile("=")
_NUMBER = re.compile(
    r"(?<![\w.])-?(?=\.?\d)(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+)?(?:e[+-]?\d+)?", re.IGNORECASE
)
_PUNCTUATION = ",.!?;:'"


def grade(solution: str, answer: str, options: Sequence[str] = ()) -> bool | None:
    """Whether a solution's final answer is right; None when it has no answer to be read.

    Args:
        answer: a letter where there are options, else the text or number, or several that are
            accepted as a Python list in a string.
        options: texts of the options; none for an open question.
    """
    if options:
        choice = parse_choice(solution, options)
        return None if choice is None else choice == answer
    found = parse_open(solution)
    if not found:
        return None
    accepted = [_normalise(text) for text in _accepted_answers(answer)]
    return any(_same(have, want) for have in found for want in accepted)


def parse_choice(solution: str, options: Sequence[str]) -> str | None:
    """The letter that a solution chooses, or None: unparsed."""
    letters, options = LETTERS[: len(options)], options[: len(LETTERS)]
    line = answer_line(solution)
    if line is not None:
        return _choice_of_line(line, letters, options)
    text = _unwrap(solution.strip(_PUNCTUATION + " \n"))
    if len(text) == 1:
        return text.upper() if text.upper() in letters else None
    for pattern in (_STATED, _IN_BRACKETS, _ALONE):
        found = [x for x in pattern.findall(text) if x in letters]
        if found:
            return found[-1]
    if len(text.split()) <= _CONTENT_WORDS:
        return _option_with_text(text, letters, options)
    places = _places(text, letters, options)
    return max(places, key=places.__getitem__) if places else None


def _choice_of_line(line: str, letters: str, options: Sequence[str]) -> str | None:
    text = _unwrap(line)
    if len(text) == 1 and text.upper() in letters:
        return text.upper()
    if exact := _option_with_text(text, letters, options):
        return exact
    if (match := _LABEL.match(text)) and match[1] in letters and not _IN_BRACKETS.search(text):
        return match[1]
    for pattern in (_IN_BRACKETS, _STATED, _ALONE):
        found = {x for x in pattern.findall(text) if x in letters}
        if found:
            return found.pop() if len(found) == 1 else None
    places = _places(text, letters, options)
    return next(iter(places)) if len(places) == 1 else None


def _option_with_text(text: str, letters: str, options: Sequence[str]) -> str | None:
    same = [x for x, o in zip(letters, options, strict=True) if o and _plain(o) == _plain(text)]
    return same[0] if len(same) == 1 else None


def _places(text: str, letters: str, options: Sequence[str]) -> dict[str, int]:
    """Where each option's text ends last; one that lies within another's place is left out."""
    spans = {}
    for letter, option in zip(letters, options, strict=True):
        if _plain(option):
            matches = list(_whole(_plain(option)).finditer(_plain(text)))
            if matches:
                spans[letter] = matches[-1].span()
    return {
        letter: end
        for letter, (start, end) in spans.items()
        if not any(s <= start and end <= e and (s, e) != (start, end) for s, e in spans.values())
    }


def parse_open(solution: str) -> list[str | float]:
    """A solution's answers to an open question: texts and numbers; empty: unparsed.

    Of every line the shortest text after a word such as "is" or "therefore" counts (in the last
    line also after "="), and the numbers in it; without any such word the whole response.
    """
    line = answer_line(solution)
    response = (solution if line is None else _unwrap(line)).strip().strip(".").lower()
    lines = response.split("\n")
    texts = []
    for i, text in enumerate(lines):
        keys = (*_KEYS, _EQUALS) if i == len(lines) - 1 else _KEYS
        tails = [parts[-1].strip() for key in keys if len(parts := key.split(text)) > 1]
        shortest = min(tails, key=len, default="")
        if shortest.strip(_PUNCTUATION):
            texts.append(shortest)
    texts = texts or ([response] if response else [])
    numbers = [number for text in texts for number in _NUMBER.findall(_ascii_minus(text))]
    return list(dict.fromkeys(_normalise(value) for value in texts + numbers))


def _accepted_answers(answer: str) -> list[str]:
    if answer.startswith("[") and len(answer) <= MAX_LITERAL:
        try:
            values = ast.literal_eval(answer)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return [answer]  # a text such as [0, 1)
        if values and all(isinstance(value, str) for value in values):
            return values
    return [answer]


def _normalise(text: str) -> str | float:
    text = _ascii_minus(text.strip())
    try:
        number = float(text.replace(",", ""))
    except ValueError:
        return text.lower()
    return number if math.isfinite(number) else text.lower()


def _same(have: str | float, want: str | float) -> bool:
    if isinstance(have, str) and isinstance(want, str):
        return bool(want) and bool(_whole(want).search(have))
    if isinstance(have, str) or isinstance(want, str):
        return False
    if round(want, 2) == 0 and want != 0:
        return math.isclose(have, want, rel_tol=0.01)
    return round(have, 2) == round(want, 2)


def _unwrap(text: str) -> str:
    previous = None
    while text != previous:
        previous = text
        text = text.strip().rstrip(".").rstrip()
        for wrapper in _WRAPPERS:
            if match := wrapper.fullmatch(text):
                text = match[1]
    return text


def _whole(text: str) -> re.Pattern:
    return re.compile(rf"(?<!\w){re.escape(text)}(?!\w)")


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")


def _ascii_minus(text: str) -> str:
    return text.replace("\N{MINUS SIGN}", "-")
