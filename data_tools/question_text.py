"""Whether a prompt asks a protected question, whatever stands around it and however it is written.

A question is compared as a sequence of tokens: words, numbers and mathematical signs, without its
options, headings, image marks, case and punctuation. ``−`` and ``-``, ``×``, ``·`` and ``*``,
``x²`` and ``$x^{2}$`` are equal; ``+`` and ``-``, ``<`` and ``>``, 1.5 and 15 are not.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from itertools import pairwise

from dreamprm_dist.data.schema import SOLUTION_MARK
from dreamprm_dist.evaluation.markup import greek_letter

# A question of as many tokens is found in the midst of a line too. A shorter one, as "What is
# shown?", may be part of many others: it must fill whole lines.
LONG_QUESTION = 10
_SPACE, _STOP, _LINE = range(3)  # what stands between two tokens: the most of it

_IMAGE_MARK = re.compile(r"<image(?:[ _]?\d+)?>")
_HEADING = re.compile(
    r"\[(?:question|problem|q|问题|题目)\]|(?:问题|题目) ?:"
    r"|(?:(?<![^\W_])question|^[^\w\n]{0,8}(?:problem|q|user|human)) ?\d{0,3} ?[*_]{0,2}:"
    r"|^[^\w\n]{0,8}(?:problem|question|q) ?(?:\d{1,3} ?[*_]{0,2}[.)]|$)"
    r"|\A[^\w\n]{0,8}\d{1,3}[.)、](?=\s)",
    re.I | re.M,
)
_OPTIONS_HEADING = re.compile(
    r"(?:^|(?<=[?.!:;]))[^\w\n]{0,8}"
    r"(?:(?:answer |possible |the )*(?:options?|choices?|answers)(?: are)?"
    r"|(?:choose|select) from|选项) ?"
    r"(?::|[^\w\n]{0,8}$)",
    re.I | re.M,
)
_LABELS = tuple(
    re.compile(pattern, re.M)
    for pattern in (
        r"^ ?(?:[Oo]ption )?[(\[<]?([A-Z])(?:[)\].:、>]| [-|] )",  # a line for each option
        r"(?<=\n) ?[(\[]?([a-z])[)\].:、] ",
        r"(?<!\w)[(\[]([A-Z])[)\]]",
        r"(?<![^\s,;:.?!])([A-Z])[.):、](?!\w[.)])",
    )
)
_BETWEEN_NAMES = re.compile(r"[\s,]*(?:,|and|or|to|&)[\s,]*")  # (A) and (B) are no options
_INSTRUCTION_START = (
    r"(?:(?:please |directly )*answer\b|please (?:select|choose|reason|think|provide|put|respond)\b"
    r"[^?\n]{0,80}\b(?:answers?|options?|choices?|letter|correct|step)\b"
    r"|your (?:final )?answer\b|let'?s think\b|(?:think|reason|solve)(?: it)? step by step\b"
    r"|请[^?\n]{0,40}(?:回答|作答|选择|选出|思考))"
)
_INSTRUCTION = re.compile(
    rf"^ ?(?:{_INSTRUCTION_START}[^?\n]*|hint\b[^?\n]*|(?:assistant|答案) ?:)$", re.I | re.M
)
_BEFORE_INSTRUCTION = re.compile(rf"(?<=[?.!]) ?(?={_INSTRUCTION_START})", re.I)

_TAG = re.compile(
    r"</?(?:(?-i:[biu])|em|strong|span|(question|problem|(?-i:p)|br|div|li|ul|ol|table|tr|td)) ?/?>"
    r"|(<\|[^<>|]{1,40}\|>)",
    re.I,
)
_NEGATED = re.compile(r"\\not\s?(=|\\in(?![a-z]))")
_AFTER_DIGIT = re.compile("(?<=\\d)(?=[\u00bc-\u00be\u2150-\u215e])")
# Braces that hold together what LaTeX shows in one place.
_FONT = re.compile(r"\\(?:text|math)(?:bf|it|rm|sf|bb|cal)?\s?\{([^{}]*)\}")
_GROUP = re.compile(r"(\\sqrt|\^)\s?\{([^{}]*)\}")
_FRACTION = re.compile(r"\\[dt]?frac\s?\{([^{}]*)\}\s?\{([^{}]*)\}")
_ONE_FACTOR = re.compile(r"\s*-?(?:[\d.]+|[^\W\d_]+|\\[A-Za-z]+)\s*")
_MAX_NESTED = 4
_COMMAND = re.compile(r"\\([A-Za-z]+|\W)")
_FORMATTING = frozenset(
    "left right big Big bigg Bigg text textbf textit mathrm mathbf mathit mathsf mathbb mathcal "
    "operatorname displaystyle quad qquad begin end rm bf".split()
)
_COMMANDS = {
    name: sign
    for sign, *names in map(
        str.split,
        (
            "× times cdot ast",
            "≤ le leq leqslant",
            "≥ ge geq geqslant",
            "≠ ne neq",
            "→ to rightarrow longrightarrow",
            "⇒ Rightarrow implies",
            "⇔ Leftrightarrow iff",
            "° circ degree",
            "| mid vert |",
            *"/ div,± pm,∓ mp,< lt,> gt,√ sqrt,∞ infty,≈ approx,≡ equiv,∑ sum,∏ prod,∫ int".split(
                ","
            ),
            *"∠ angle,⊥ perp,∥ parallel,∂ partial,∇ nabla,∪ cup,∩ cap,∈ in,% %".split(","),
            *"∉ notin,≅ cong,∼ sim,← leftarrow,⇌ rightleftharpoons,⊂ subset,∝ propto".split(","),
        ),
    )
    for name in names
}
_SUPERSCRIPTS = re.compile(r"[⁰¹²³⁴-⁹⁺⁻ⁿ]+")
_DEGREES = re.compile(r"\^?[°º˚]")
_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("−–‐‑‒﹣", "-"),
        **dict.fromkeys("—―", ";"),
        **dict.fromkeys("×✕✖·∙∗", "⋅"),
        **dict.fromkeys("÷∕⁄", "/"),
        **dict.fromkeys("⩽≦", "≤"),
        **dict.fromkeys("⩾≧", "≥"),
        **dict.fromkeys("’‘′`", "'"),
        **dict.fromkeys("“”„«»", '"'),
        **dict.fromkeys("。．", "."),
        **dict.fromkeys("【〔〖", "["),
        **dict.fromkeys("】〕〗", "]"),
        **dict.fromkeys("$_{}~", ""),
    }
)
_REWRITES = tuple(
    (re.compile(pattern, re.M), by)
    for pattern, by in (
        (r"[^\S\n]+", " "),
        (r" ?\n[ \n]*", "\n"),
        (r"\( ?\)|\[ ?\]", ""),  # of an image mark that is gone
        (r"<=", "≤"),
        (r">=", "≥"),
        (r"!=|<>", "≠"),
        (r"\+/?-", "±"),
        (r"-+>", "→"),
        (r"=+>", "⇒"),
        (r"\*{2,}", " "),
        (r"^[-*•●▪■►] ", ""),  # of a list
        (r"(?<=[\w)\]])\*(?=[\w(\[√-])| \* ", "⋅"),
        (r"(?<=\d) ?[xX] ?(?=\d)", "⋅"),
        # A hyphen is no minus: x-axis, 5-year, COVID-19.
        (r"(?<=[^\W_])-(?=[^\W\d_]{2})|(?<=[^\W\d_]{2})-(?=\w)", " "),
        (r"(?<=\d),(?=\d{3}(?!\d))", ""),  # 1,500
        (r"(?<![\w.])\.(?=\d)", "0."),
        # Signs that are punctuation elsewhere: a ratio, a factorial, a derivative.
        (r"(?<=\d):(?=\d)", "∶"),
        (r"(?<=[\d)])!|(?<=\b[^\W\d_])!", "¡"),
        (r"(?<=\b[^\W\d_])'(?![^\W\d_])|(?<=[)′])'", "′"),
    )
)
_NO_SPACES = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # scripts with no spaces between words
_GREEK = r"\u0391-\u03c9"  # a letter is a symbol, and stands before another without a space
_TOKEN = re.compile(
    rf"\d+(?:\.\d+)?|[{_NO_SPACES}{_GREEK}]|[^\W\d_{_NO_SPACES}{_GREEK}]+|[^\w\s]|\n"
)
_SIGNS = frozenset("-/⋅%&^()[]¡′")
_SYMBOLS = ("Sm", "So", "Sc")  # Unicode's categories of +, <, ←, □ and €
_STOPS = frozenset('.?!;:"')


class QuestionIndex:
    """Protected questions, each with the place it comes from."""

    def __init__(self) -> None:
        self._short: dict[tuple[str, ...], str] = {}
        self._long: dict[tuple[str, ...], dict[tuple[str, ...], str]] = {}  # by their beginning

    def add(self, text: str, place: str) -> None:
        """Protect the question in a text; one without words or signs is none."""
        tokens = tuple(question_tokens(text))
        if len(tokens) >= LONG_QUESTION:
            self._long.setdefault(tokens[:LONG_QUESTION], {}).setdefault(tokens, place)
        elif tokens:
            self._short.setdefault(tokens, place)

    def find(self, texts: Iterable[str]) -> str | None:
        """The place of a protected question that one of the texts asks; None when none does."""
        return next((place for text in texts if (place := self._place(text))), None)

    def _place(self, text: str) -> str | None:
        tokens, gaps = _prompt_tokens(text)
        for start, gap in enumerate(gaps[:-1]):
            beginning = tuple(tokens[start : start + LONG_QUESTION])
            for question, place in self._long.get(beginning, {}).items():
                end = start + len(question)
                if tuple(tokens[start:end]) == question and _is_whole(tokens, gaps, start, end):
                    return place
            if gap == _LINE:
                for end in range(start + 1, min(start + LONG_QUESTION, len(gaps))):
                    if gaps[end] == _LINE and tuple(tokens[start:end]) in self._short:
                        return self._short[tuple(tokens[start:end])]
        return None


def question_tokens(text: str) -> list[str]:
    """The tokens of the question in a text: what follows its last heading, up to its options."""
    text = next((part for part in reversed(_HEADING.split(_plain(text))) if part.strip()), "")
    text = text[: _options_start(text)]
    return _tokens(_INSTRUCTION.sub("", _BEFORE_INSTRUCTION.sub("\n", text)) or text)[0]


@lru_cache(maxsize=1024)  # the solutions of a question follow each other
def _prompt_tokens(text: str) -> tuple[list[str], list[int]]:
    """All tokens of a prompt; a line begins after each heading and with the options."""
    text = _HEADING.sub("\n", _BEFORE_INSTRUCTION.sub("\n", _plain(text)))
    start = _options_start(text)
    return _tokens(f"{text[:start]}\n{text[start:]}")


def _is_whole(tokens: list[str], gaps: list[int], start: int, end: int) -> bool:
    """Whether the tokens are no piece of a longer formula or of a sentence that goes on."""
    operator_before = gaps[start] == _SPACE and _is_sign(tokens[start - 1])
    goes_on = gaps[end] == _SPACE and tokens[end] not in (")", "]")
    return not goes_on and (not operator_before or tokens[start - 1] in "()[]")


def _options_start(text: str) -> int:
    """Where the list of options begins: at its heading, else at its A, which a B follows."""
    first = len(text)
    for style in _LABELS:
        labels = list(style.finditer(text))
        for i, (a, b) in reversed([*enumerate(pairwise(labels))]):
            if a[1] + b[1] not in ("AB", "ab"):
                continue
            # Small letters may also be the parts of a problem.
            if a[1] == "a" and text[: a.start()].rstrip()[-1:] not in ("?", ":"):
                continue
            # In the midst of a sentence only a longer list is one of options.
            inside = text[max(a.start() - 2, 0) : a.start()].rstrip(" ")[-1:].isalnum()
            longer = i + 2 < len(labels) and labels[i + 2][1] in "Cc"
            names = _BETWEEN_NAMES.fullmatch(text, a.end(), b.start())
            if not inside or (longer and not names):
                first = min(first, a.start())
                break
    for heading in _OPTIONS_HEADING.finditer(text, 0, first):
        if first == len(text) or text[heading.end() : first].isspace() or heading.end() == first:
            return heading.start()
    return first


def _plain(text: str) -> str:
    """A text with one character for each sign; lines, case and punctuation stay."""
    text = _IMAGE_MARK.sub(" ", html.unescape(text.partition(SOLUTION_MARK)[0]))
    text = _TAG.sub(lambda tag: "\n" if tag[1] or tag[2] else "", _AFTER_DIGIT.sub(" ", text))
    text = _NEGATED.sub(lambda sign: "≠" if sign[1] == "=" else "∉", text)
    for _ in range(_MAX_NESTED):
        before, text = text, _FONT.sub(r"\1", text)
        text = _GROUP.sub(lambda found: found[1] + _grouped(found[2]), text)
        text = _FRACTION.sub(lambda found: f" {_grouped(found[1])}/{_grouped(found[2])}", text)
        if text == before:
            break
    text = _COMMAND.sub(_command, text).replace("{", "").replace("}", "")
    text = _DEGREES.sub(" degrees ", _SUPERSCRIPTS.sub(r"^\g<0>", text))
    text = unicodedata.normalize("NFKC", text).translate(_CHARACTERS).strip()
    for pattern, by in _REWRITES:
        text = pattern.sub(by, text)
    return text


def _grouped(part: str) -> str:
    return part if _ONE_FACTOR.fullmatch(part) else f"({part})"


def _command(match: re.Match) -> str:
    """What a LaTeX command shows."""
    name = match[1]
    if sign := _COMMANDS.get(name) or greek_letter(name):
        return sign
    return f" {name} " if name.isalpha() and name not in _FORMATTING else " "


def _is_sign(token: str) -> bool:
    return token in _SIGNS or unicodedata.category(token[0]) in _SYMBOLS


def _tokens(text: str) -> tuple[list[str], list[int]]:
    """The tokens, and the gap before each of them and after the last."""
    tokens: list[str] = []
    gaps = [_LINE]
    for token in _TOKEN.findall(text.casefold()):
        if token[0].isalnum() or _is_sign(token):
            tokens.append(token)
            gaps.append(_SPACE)
        elif token == "\n":
            gaps[-1] = _LINE
        elif token in _STOPS:
            gaps[-1] = max(gaps[-1], _STOP)
    gaps[-1] = _LINE
    return tokens, gaps
