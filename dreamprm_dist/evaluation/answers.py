"""A solution's final answer: where it stands, and one normal form in which equal answers are equal.

Grading, self-consistency and answer keys read texts with the functions of this file. Texts that are
"plain" have been through `markup.plain`.
"""

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from dreamprm_dist.evaluation.markup import BOX, BOX_END, plain
from dreamprm_dist.prm.solutions import REASONING_MARKER

_ANSWER = re.compile(
    r"^[^\w\n]*(?:\d{1,3}[.)] ?)?(?:(?:the|my|final|correct|best)[ _])*(?:ans(?:wer)?|答案)(?: is)?"
    r"[^\w\n:]*(?::|$|(?<=[)\]]))|\"(?:final[ _])?answer\" ?:",
    re.IGNORECASE | re.MULTILINE,
)
_CONTENT = re.compile(r"[^\s\-_=*#|.:,;!?\"'()\[\]{}\x02\x03]")
MAX_WRAPPERS = 20  # nested brackets and quotes around an answer
_PAIRS = {"(": ")", "[": "]", "{": "}", "<": ">"}
_OPENINGS = {closing: opening for opening, closing in _PAIRS.items()}
_CORE = re.compile(r"\w.*\w")
_QUOTE = re.compile(r"(?<!\w)['\"]|['\"](?!\w)")  # and no apostrophe
SHORT = 5  # words; MMMU looks for an option's text in responses that have more

# What follows one of these is the answer, by MMMU; in the last line also what follows "=".
_KEY = r"(?<!\w)(?:could be|so|is|thus|therefore|final|answer|result)(?: ?:)? "
_KEYS, _KEYS_OR_EQUALS = (re.compile(key, re.IGNORECASE) for key in (_KEY, rf"{_KEY}|="))

_DIGITS = r"(?=\.?\d)(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+)?(?:e[+-]?\d+)?"
_POWER_OF_TEN = re.compile(r"(?:(?<=\d)( ?[×·*x] ?)|(?<![\w.^]))10\^\(?([+-]?\d{1,3})\)?(?!\d)")
# Not the parts of a range, a ratio, a date or a time: 5-10, 2:3, 2024-05-01, 12:30.
_NUMBER_IN_TEXT = re.compile(
    rf"(?<![\w.])(?<!\d[-:])-?(?:\d{{1,15}} ?/ ?\d{{1,15}}(?![\d/.])|{_DIGITS})(?!\.?\d|[-:]\d)"
)
_FRACTION = re.compile(r"([+-]?) ?(?:(\d{1,15}) )?(\d{1,15}) ?/ ?(\d{1,15})")
_GROUPED = re.compile(r"\d{1,3}(?:[ ']\d{3})+(?=\.|$)")
# `5 m` and `42 apples`, but not the algebra of `2x`, `3π` and `2 sin x`.
_UNIT = (
    r"(?:%|°|(?:[mgslhvwjk]|(?!(?:[abcnxyz]+|pi|sin|cos|tan|log|ln)(?![^\W\d]))[^\W\d]{2,})"
    r"(?![^\W\d]))(?:[^\d,;=^]|\^-?\d)*"
)
_WITH_UNIT = re.compile(rf"([+-]?[\d ,.'/]*\d(?:e[+-]?\d+)?) ?({_UNIT})")
# A capital behind a space is a unit: `5 N`, `5 nC`, `5 N/m`.
_WITH_CAPITAL = re.compile(r"([+-]?[\d ,.'/]*\d(?:e[+-]?\d+)?) ([a-zµμ]?[ACFKNTΩ](?:[/·][\w^]+)?)")
_SIGN_SPACE = re.compile(r" ?([-+=<>≤≥≠×·/^*:±√→]) ?|(?<=[(\[]) | (?=[)\]])")
_LIST_COMMA = re.compile(r" ?, ?(?!\d{3}(?!\d))")
_MAX_UNIT_WORDS = 2
# What is said in words: signs, and what changes no number.
_WORDS = tuple(
    (re.compile(words), sign)
    for words, sign in (
        (r"^(?:(?:about|around|roughly|approx(?:\.|imately)?) )+(?=[-+]?[\d.])", ""),
        (r"^(?:us|usd|eur|gbp|inr|cny|rmb|rs\.?) ?(?=\d)", ""),
        (r"^(?:minus|negative) (?=[\d.])", "-"),
        (r"(?<=\d) ?per ?cent\b", "%"),
        (r"(?<=\d) ?deg(?:rees?)?\b(?: ?(?=[cf]\b|celsius|fahrenheit))?", "°"),
        (r"(?<=°)celsius\b", "c"),
        (r"(?<=°)fahrenheit\b", "f"),
        (r"(?<=\d) ?thousand\b", "e3"),
        (r"(?<=\d) ?million\b", "e6"),
        (r"(?<=\d) ?billion\b", "e9"),
        (r"(?<![^\W\d])pi(?![^\W\d])", "π"),
        (r"(?<![^\W\d])sqrt(?=\W)", "√"),
        (r"√\((\w+)\)", r"√\1"),
        (r"(?<=\d)(?: | ?[·*×] ?)(?=π)", ""),
        (r"\^\(?(\d?[+-])\)?(?!\w)", r"\1"),  # the charge of an ion
    )
)
# `The fox` is `fox`, but `A` before a capital may be the label of an option.
_ARTICLE = re.compile(r"^(?:[Tt]he|THE|[Aa]n|a|A(?= [a-z])) (?=[^\W\d_]{2})")
_UNWRITTEN = dict.fromkeys(map(ord, "≈€£¥₹"))  # the dollar is gone with LaTeX


class Value(NamedTuple):
    """An answer in normal form: a text, or a number with a unit where it has one.

    Attributes:
        text: in small letters; with a number, only its unit.
    """

    text: str
    number: float | None = None

    def __bool__(self) -> bool:
        return bool(self.text) or self.number is not None

    def __str__(self) -> str:
        if self.number is None:
            is_letter = len(self.text) == 1 and self.text.isascii()
            return self.text.upper() if is_letter else self.text
        return f"{_rounded(self.number):.15g} {self.text}".strip()


def same_number(have: float, want: float) -> bool:
    """MMMU's rule, two decimals; below 0.005, where all would be 0.00, to two digits."""
    return _rounded(have) == _rounded(want)


def _rounded(number: float) -> float:
    if math.isfinite(number) and (two_decimals := round(number, 2)):
        return two_decimals
    return float(f"{number:.2g}") + 0.0  # no -0


class Reading(NamedTuple):
    """What of a solution can hold its answer.

    Attributes:
        text: plain; where the answer is stated, one line that is nothing else.
        stated: whether `Answer:` or `\\boxed{}` says where it is.
    """

    text: str
    stated: bool


def read(solution: str) -> Reading:
    r"""The first line after the last `Answer:`, else what is in the last `\boxed{}`, else all."""
    text = plain(REASONING_MARKER.sub("", solution))
    labels = list(_ANSWER.finditer(text))
    if labels:
        lines = text[labels[-1].end() :].split("\n")
        text = next((line for line in lines if _CONTENT.search(line)), "")
        if text.count(BOX) > 1:  # `\boxed{A} or \boxed{B}`
            text = text.replace(BOX, "")
    if BOX in text:
        text = text.rpartition(BOX)[2]
        text = text.partition(BOX_END if BOX_END in text else "\n")[0]
        return Reading(" ".join(text.split()), True)
    return Reading(text.replace(BOX_END, "").strip(), bool(labels))


def unwrap(text: str) -> str:
    """A plain text without brackets, quotes and punctuation around it, closed or half closed.

    The brackets of a list, a pair or an interval, which hold a comma, are part of it.
    """
    for _ in range(MAX_WRAPPERS):
        before = text
        text = text.lstrip(" ,;:!?").rstrip(" .,;:")
        if text[-1:] in ("!", "?") and not text[-2:-1].isdigit():
            text = text[:-1]
        first, last = text[:1], text[-1:]
        if '"' in (first, last) or first == last == "'":
            core = _CORE.search(text)
            if not (core and _QUOTE.search(core[0])):
                text = text.strip('"') if '"' in (first, last) else text[1:-1]
        elif (first in _PAIRS or last in _OPENINGS) and not _LIST_COMMA.search(text):
            if first in _PAIRS and _encloses(text):
                text = text[1:-1]
            elif last in ")]}" and text.count(last) > text.count(_OPENINGS.get(last, "")):
                text = text[:-1]
            elif first in "([{" and text.count(first) > text.count(_PAIRS.get(first, "")):
                text = text[1:]
        if text == before:
            break
    return text


def _encloses(text: str) -> bool:
    """Whether the bracket that closes the first one is the last character."""
    opening, closing = text[0], _PAIRS[text[0]]
    depth = 0
    for i, character in enumerate(text):
        depth += (character == opening) - (character == closing)
        if not depth:
            return i == len(text) - 1
    return False


def value(text: str) -> Value:
    """The normal form of a plain text; false where there is nothing but punctuation."""
    if not _CONTENT.search(text):
        return Value("")
    text = " ".join(unwrap(text).translate(_UNWRITTEN).split())
    written, text = text, _read_words(_ARTICLE.sub("", text).casefold())
    if (number := _number(text)) is not None:
        return Value("", number)
    unit = _WITH_UNIT.fullmatch(text)
    if unit and len(unit[2].split()) <= _MAX_UNIT_WORDS:
        number = _number(unit[1])
        return Value(text) if number is None else Value(unit[2].rstrip(" ."), number)
    unit = _WITH_CAPITAL.fullmatch(_powers_read(written))
    if unit and (number := _number(unit[1])) is not None:
        return Value(unit[2], number)
    return Value(_LIST_COMMA.sub(", ", _SIGN_SPACE.sub(r"\1", text)).strip())


def numbers(text: str) -> list[float]:
    """The numbers in a plain text: the 5 of `5kg`, none in `CO2`."""
    found = map(_number, _NUMBER_IN_TEXT.findall(_read_words(text.casefold())))
    return [number for number in found if number is not None]


def _read_words(text: str) -> str:
    """A text in small letters with signs for words: of percent, of degrees, of a million."""
    text = _powers_read(text)
    for words, sign in _WORDS:
        text = words.sub(sign, text)
    return text


def _powers_read(text: str) -> str:
    return _POWER_OF_TEN.sub(lambda power: ("e" if power[1] else "1e") + power[2], text)


def _number(text: str) -> float | None:
    if fraction := _FRACTION.fullmatch(text):
        sign, whole, above, below = fraction.groups()
        if not int(below):
            return None
        number = int(whole or 0) + int(above) / int(below)
        return -number if sign == "-" else number
    text = text.replace(" ", "", 1) if text[:1] in ("+", "-") else text
    digits = text.lstrip("+-")
    if _GROUPED.match(digits):
        text = re.sub("[ ']", "", text)
    elif not re.fullmatch(_DIGITS, digits) or len(text) - len(digits) > 1:
        return None
    number = float(text.replace(",", ""))
    return number if math.isfinite(number) else None


def open_texts(reading: Reading) -> list[str]:
    """What MMMU's rules take for answers to an open question; empty: nothing can be read.

    Of every line the shortest text after a word such as "is" or "therefore", and a last paragraph
    of a few words; without any of these the whole response.
    """
    lines = reading.text.split("\n")
    texts = [_last_words(reading)] if len(lines) > 1 and unwrap(_last_words(reading)) else []
    for i, line in enumerate(lines):
        found = tail(line, i == len(lines) - 1)
        if unwrap(found):
            texts.append(found)
    return texts or ([reading.text] if unwrap(reading.text) else [])


def tail(line: str, is_last: bool = True) -> str:
    """What follows the last word such as "is" or, in the last line, "=" of a plain line."""
    start = None
    for found in (_KEYS_OR_EQUALS if is_last else _KEYS).finditer(line):
        start = found.end()
    return "" if start is None else line[start:].strip()


def whole_words(texts: Sequence[str]) -> re.Pattern:
    """An expression that finds plain texts as whole words and numbers, the longest first."""
    words = "|".join(
        rf"(?<!-){re.escape(text)}" if text[:1].isdigit() else re.escape(text)
        for text in sorted(texts, key=len, reverse=True)
    )
    return re.compile(rf"(?<!\w)(?<!\d[.,])(?:{words})(?!\w|[.,]\d)", re.IGNORECASE)


def _last_words(reading: Reading) -> str:
    """A stated answer, a response of a few words or a last paragraph of that; empty: nothing."""
    paragraph = reading.text.rpartition("\n\n")[2]
    is_short = "\n" not in paragraph and len(paragraph.split()) <= SHORT
    return paragraph if reading.stated or is_short else ""


def extract_answer(solution: str) -> str | None:
    """The final answer of a solution in its normal form: equal answers are equal strings.

    It is what is stated (see `read`), else what the last line ends with after "is", "=" and their
    like, else a response or a last paragraph of a few words. A single letter is upper case.

    Returns:
        The answer, or None when there is none: such a solution is "unparsed".
    """
    found = _final_value(solution)
    return None if found is None else str(found)


def _final_value(solution: str) -> Value | None:
    reading = read(solution)
    after_key = tail(reading.text.rpartition("\n")[2])
    return value(after_key) or value(_last_words(reading)) or None


def open_votes(solutions: Sequence[str]) -> list[str | None]:
    """The answers of one question's solutions, as `extract_answer` gives them, as votes.

    A number votes with and without its unit for the same, unless several units stand in question.
    """
    values = [_final_value(solution) for solution in solutions]
    units = defaultdict(set)
    for found in values:
        if found and found.number is not None and found.text:
            units[_rounded(found.number)].add(found.text)
    votes: list[str | None] = []
    for found in values:
        if found and found.number is not None and len(units[_rounded(found.number)]) == 1:
            found = Value("", found.number)
        votes.append(None if found is None else str(found))
    return votes
