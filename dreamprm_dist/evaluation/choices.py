"""The letter of the option that a solution chooses."""

import re
from collections.abc import Sequence

from dreamprm_dist.evaluation.answers import SHORT, read, tail, unwrap, value, whole_words
from dreamprm_dist.evaluation.markup import plain

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# Not the article of "A cat", nor the pronoun, but "A and B", "A because"; nor "A = 5".
_NO_WORD = (
    r"(?!\s*=|(?<=[AI])\s+"
    r"(?!(?:and|or|to|because|since|as|due|is (?:the|right|correct))\b)(?:[A-Za-z]\w|\d))"
)
_LABEL = re.compile(
    r"[\s\"']*(?i:(?:option|choice|answer)\s+)?"
    r"(?:[(\[<]\s?([A-Za-z])\s?[)\]>][.:]?|[(\[<\"']?(?:([A-Za-z])(?:[.:)](?=\s|$|[^\x00-\x7f])|[、．：）])"
    r"|([A-Z])[\"']?(?=\s*[,;]|\s+[-:]|\s*$)))"
)
_STATED = re.compile(
    r"(?:(?i:\b(?:answer|option|choice)(?:\s+(?:is|would\s+be))?\s*:?\s*(?:option\s+)?)"
    r"|(?:答案|选[项择]?)\s*[是为]?\s*:?\s*(?!.\s?[和或与及]))"
    r"[(\[<\"']?([A-Z])(?![a-zA-Z0-9_'])(?!(?<=[AI])\s+(?:[A-Z]\w|\d))"
)
_SAYS_ANSWER = re.compile(r"\b(?:answer|option|choice) is\b", re.IGNORECASE)
# Letters that are named to be ruled out: `not B`, `neither A nor B`, `(B) is wrong`.
_OPTION = r"(?:option\s+)?(?:[(\[<][A-Z][)\]>]|[A-Z](?![\w'+-]))"
_DENIED = re.compile(
    rf"(?:(?i:\b(?:neither|none\s+of)\s+){_OPTION}(?:(?:,?\s(?:and|or|nor)|,)\s{_OPTION})*"
    rf"|(?i:\bnot|n't|\bnor)\s+{_OPTION}|(?<![\w(\[<]){_OPTION}\s+(?:is|are)\s+"
    r"(?:not|wrong|incorrect|false|ruled\s+out)\b)"
)
_IN_BRACKETS = re.compile(r"\(([A-Z])\)")
_IN_ANY_BRACKETS = re.compile(r"[(\[<]([A-Z])[)\]>]")
_ALONE = re.compile(rf"(?<!\S)[\"']?([A-Z])(?=[.,;:!?\"']*(?:\s|$)){_NO_WORD}")
# What names another option after a label: `A or B`, `A, no B`, `(A) (B)`; not `B. C is too big`.
_RIVAL = re.compile(
    r"[\s,;/&+(\[]*(?:(?:or|and|no|nor|but|maybe|perhaps|wait|actually|rather|both|either|option)"
    rf"[\s,]+)*[(\[<]?([A-Z])(?![\w'])(?![)\]>]?\s+(?:is|was|has|does|can)\b){_NO_WORD}"
)
_RIVAL_IN_BRACKETS = re.compile(r"(?i:\b(?:or|and)\s+(?:option\s+)?)[(\[<]([A-Z])[)\]>]")
_REASONING = re.compile(
    r"\b(?:so|hence|thus|therefore|but|not|no|wrong|wait|answer|option|choice)\b", re.IGNORECASE
)


def parse_choice(solution: str, options: Sequence[str]) -> str | None:
    """The letter that a solution chooses, or None: unparsed."""
    letters = LETTERS[: len(options)]
    texts = plain_options(options[: len(LETTERS)])
    text, stated = read(solution)
    last = text.rpartition("\n")[2]
    for line in (last, tail(last)):
        letter = only_letter(line, letters)
        if not letter or (line != last and {*_ALONE.findall(last)} & {*letters} - {letter}):
            continue
        if stated or letter in line or line == text or _SAYS_ANSWER.search(last):
            return letter
    if letter := _option_with_text(text, texts):
        return letter
    # The options' own texts hold letters that choose nothing.
    named = [option for option in texts if len(unwrap(option)) > 1]
    unnamed = whole_words(named).sub(" ", text) if named else text
    found = _letters(_DENIED.sub(" ", unnamed), letters, stated)
    if found:
        return found[-1] if not stated or len(set(found)) == 1 else None
    if letter := _option_with_text(tail(last), texts):
        return letter
    places = _places(text, texts)
    if len(places) > 1 if stated else len(text.split()) <= SHORT:
        return None
    return max(places, key=places.__getitem__, default=None)


def _letters(text: str, letters: str, stated: bool) -> list[str]:
    """The letters that a text, without the options' own texts, names; the last one counts most."""
    in_brackets = (_IN_ANY_BRACKETS if stated else _IN_BRACKETS).findall(text)
    by_statement = _STATED.findall(text)
    lines = text.split("\n")
    labelled = [line for line in lines if split_label(line)[0] in {*letters}]
    if len(labelled) == 1 and labelled[0] in (lines[0], lines[-1]):
        label, rest = split_label(labelled[0])
        rival = _RIVAL.match(rest)
        rivals = {*(rival.groups() if rival else ()), *_RIVAL_IN_BRACKETS.findall(rest)}
        if stated:
            return [label, *rivals]
        if not (by_statement or rivals or {*in_brackets} - {label} or _REASONING.search(rest)):
            return [label]
    kinds = (in_brackets, by_statement) if stated else (by_statement, in_brackets)
    for names in (*kinds, _ALONE.findall(text)):
        if found := [x for x in names if x in letters]:
            return found
    return []


def plain_options(options: Sequence[str]) -> list[str]:
    """The options as plain texts of one line, as `without_labels`."""
    return without_labels([" ".join(plain(text).split()) for text in options])


def without_labels(texts: Sequence[str]) -> list[str]:
    """Texts of options without letters of their own, if each begins with its own (`A. cat`)."""
    labels, rests = zip(*map(split_label, texts), strict=True) if texts else ((), ())
    own = "".join(labels) == LETTERS[: len(texts)] and all(rest.strip() for rest in rests)
    return [rest.strip() for rest in rests] if own else list(texts)


def split_label(text: str) -> tuple[str, str]:
    """The label that a plain text begins with, as `B. cat`, `(b) cat` or `B - cat`, and the rest.

    The label is upper case, and empty where there is none.
    """
    match = _LABEL.match(text)
    return (
        ((match[1] or match[2] or match[3]).upper(), text[match.end() :]) if match else ("", text)
    )


def only_letter(text: str, letters: str) -> str | None:
    """The letter, small or not, that a plain text is, whatever stands around it."""
    core = unwrap(unwrap(text).lstrip(" -=>|").rstrip(" |")).upper()
    return core if len(core) == 1 and core in letters else None


def options_with_text(text: str, texts: Sequence[str]) -> list[str]:
    """The letters of the options that a plain text is equal to; a unit may be left out."""
    have = value(text)
    wants = [(x, value(option)) for x, option in zip(LETTERS, texts, strict=False)]
    equal = [x for x, want in wants if have and want == have]
    if equal or have.number is None:
        return equal
    return [x for x, w in wants if w.number == have.number and not (w.text and have.text)]


def _option_with_text(text: str, texts: Sequence[str]) -> str | None:
    equal = options_with_text(text, texts)
    return equal[0] if len(equal) == 1 else None


def _places(text: str, texts: Sequence[str]) -> dict[str, int]:
    """Where each option's text ends last; one that lies within another's place is left out."""
    text = " ".join(text.split())
    spans = {}
    for letter, option in zip(LETTERS, texts, strict=False):
        if unwrap(option):
            for match in whole_words([unwrap(option)]).finditer(text):
                spans[letter] = match.span()
    return {
        letter: end
        for letter, (start, end) in spans.items()
        if not any(s <= start and end <= e and (s, e) != (start, end) for s, e in spans.values())
    }
