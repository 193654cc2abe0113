r"""A text that a model wrote without its markup: variants of characters, HTML, markdown, LaTeX.

What is left means the same and compares as it reads: `**B**`, `\textbf{B}` and `<b>B</b>` are one,
`１，０００`, `1\,000` and `1 000` nearly so. Every expression takes time in proportion to the text.
"""

import html
import re
import unicodedata
from functools import lru_cache

BOX, BOX_END = "\x02", "\x03"  # stand around what was in \boxed{}; no other control is left

_NOT_PLAIN = re.compile(r"[^\n\x20-\x7e]")
_SUPERSCRIPTS = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207a\u207b]+")
_FRACTION_AFTER_DIGIT = re.compile("(?<=\\d)(?=[\u00bc-\u00be\u2150-\u215e])")
_EMOJI = re.compile(
    "[\u2600-\u266c\u2670-\u27bf\u2b00-\u2bff\ufe00-\ufe0f\U0001f000-\U0001f0ff\U0001f18a-\U0001faff]"
)
_SIGNS = str.maketrans(
    {
        **dict.fromkeys("\u2212\u2043", "-"),
        **dict.fromkeys("\u2018\u2019\u201a\u201b\u2032\u00b4\u02b9\u02bc", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb\u2039\u203a", '"'),
        **dict.fromkeys("\u300c\u300d\u300e\u300f", '"'),
        "\u2044": "/",
        "\u2236": ":",
        "\u3002": ".",
        "\u3001": ",",
        "\u00ba": "°",
        # Letters in black circles and squares, which Unicode does not call variants.
        **{chr(start + i): chr(65 + i) for start in (0x1F150, 0x1F170) for i in range(26)},
    }
)

# As models end their thoughts: most, Kimi-VL, Magistral, and gpt-oss.
_THOUGHT_END = re.compile(
    r"</think(?:ing)?>|◁/think▷|\[/THINK\]|<\|channel\|>final<\|message\|>", re.IGNORECASE
)
_ENTITY = re.compile(r"&(?:#\d{1,7}|#x[\da-f]{1,6}|[a-z]\w{1,30});", re.IGNORECASE)
_SPECIAL_TOKEN = re.compile(r"<\|[^<>|]{1,40}\|>")
_ANSWER_TAG = re.compile(
    r"<(/?)(?:final[ _-]?)?answer(?:\s[^<>]{0,99})?>|\[(/?)(?:final[ _-]?)?answer\](?!\s?:)",
    re.IGNORECASE,
)
_BREAK_TAG = re.compile(r"</?(?:br|p|div|li|ul|ol|tr|h[1-6])(?:\s[^<>]{0,99})?/?>", re.IGNORECASE)
# `<b>` is a tag before a text or where `</b>` follows; else a letter in brackets.
_TAG = re.compile(
    r"</?[a-z][\w:-]{1,30}(?:\s[^<>]{0,99}=[^<>]{0,99})?\s?/?>|</[a-z]>"
    r"|(?<![^\W_])<(?:(?-i:[abipqsu])>(?=[^\n]{0,99}?\w)|([a-z])>(?=[^<\n]{0,99}</\1>))",
    re.IGNORECASE,
)

_FENCE = re.compile(
    r"^[ ]*(?:```|~~~)(?:text|txt|plaintext|json|markdown|md|latex|tex|html|xml|yaml|math|python)?"
    r"[ ]*$",
    re.MULTILINE,
)
_STRUCK = re.compile(r"~~[^~\n]*~~")
_LINE_MARK = re.compile(
    r"^(?:[ ]|#{2,6}|#[ ]|>(?=[^\s\d])|>[ ](?=[^\s\d])|[-*+•][ ](?![ ]*\d))+", re.MULTILINE
)
_EMPHASISED_LETTER = re.compile(r"(?<![\w*_`])[*_`]+([A-Za-z])[*_`]+(?!\w)")
_MARKS = re.compile(
    r"`+|(?<!\d)\*{2,}|\*{2,}(?!\d)|(?<![^\W_])(?<!\*)\*(?![\s*])|(?<![\s*])\*(?![^\W_]|\*)"
    r"|(?<![^\W_])_+|_+(?![^\W_])|_(?=\d)"
)

# What is left of LaTeX in JSON that did not double its backslashes.
_LOST_ESCAPE = re.compile("\x08(?=oxed)|\x0c(?=rac)|\t(?=ext(?:bf|it|rm)?\\{|imes )")
_LOST_ESCAPES = {"\x08": "\\b", "\x0c": "\\f", "\t": "\\t"}
_NO_ESCAPE = re.compile(r"(?<![\\\w])boxed(?=\{)")
_DOUBLE_ESCAPE = re.compile(r"\\(?=\\(?:boxed|text|math|[dt]?frac)\w*\{)")
_EMPHASISED_LATEX = re.compile(r"\\(?:textbf|textit|emph|underline)\s?\{([A-Za-z])\}")
_DIGIT_SPACE = re.compile(r"(?<=\d)(?:\\[,!;:]|\{,\})(?=\d{3})")
_SPACING = re.compile(r"\\(?:[,;:!> ]|q?quad(?![A-Za-z]))|~")
_FONT = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|sc|normal)?|math(?:bf|rm|it|sf|tt|bb|cal|normal)|bm|boldsymbol"
    r"|[mhf]box|ce|operatorname\*?|emph|underline|(?:display|text)style|left|right|[bB]igg?[lr]?"
    r")(?![A-Za-z])|\\(?:begin|end|(?:text)?color(?:box)?)\{[^{}\n]{0,30}\}|\\[()\[\]]"
)
_FRACTION = re.compile(r"\\[dtc]?frac\s?(?:\{([^{}]*)\}\s?\{([^{}]*)\}|(\d)\s?(\d))")
_ROOT = re.compile(r"\\sqrt\s?\{([^{}]*)\}")
_POWER = re.compile(r"\^\{([^{}]*)\}")
_ONE_FACTOR = re.compile(r"-?(?:[\d.]+|\w)|\\[A-Za-z]+")
_ONE_TERM = re.compile(r"-?[\w.,]+|\\[A-Za-z]+")
_BOX_OR_BRACE = re.compile(r"\\boxed\s?\{|\\?[{}]|\\boxed\s?([^\s{}\\])")
_COMMAND = re.compile(r"\\(?!boxed(?![A-Za-z]))([A-Za-z]+)")
_COMMANDS = {
    "times": "×", "cdot": "·", "div": "÷", "pm": "±", "circ": "°", "degree": "°", "infty": "∞",
    "le": "≤", "leq": "≤", "ge": "≥", "geq": "≥", "ne": "≠", "neq": "≠", "approx": "≈",
    "lt": "<", "gt": ">", "sqrt": "√", "to": "→", "rightarrow": "→",
}  # fmt: skip


def plain(text: str) -> str:
    """The text without markup; a letter that was emphasised becomes `(X)`, `\\boxed{x}` BOX x.

    Lines stay lines, each without white space at its ends and with single spaces in it. Text that
    is struck out and the thoughts before a `</think>` are gone; `<answer>` starts a line `Answer:`.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = _LOST_ESCAPE.sub(lambda found: _LOST_ESCAPES[found[0]], text)
    if (answer := _THOUGHT_END.split(text)[-1]).strip():
        text = answer
    text = _without_latex(_without_markdown(_without_html(_plain_characters(text))))
    return "\n".join(" ".join(line.split()) for line in text.split("\n"))


def _plain_characters(text: str) -> str:
    text = unicodedata.normalize("NFC", _EMOJI.sub("", text))
    text = _SUPERSCRIPTS.sub(lambda run: "^" + unicodedata.normalize("NFKC", run[0]), text)
    text = _FRACTION_AFTER_DIGIT.sub(" ", text)
    return _NOT_PLAIN.sub(lambda found: _plain_character(found[0]), text)


@lru_cache(maxsize=4096)
def _plain_character(character: str) -> str:
    text = character.translate(_SIGNS)
    text = unicodedata.normalize("NFKC", text).translate(_SIGNS)
    category = unicodedata.category(text[0])
    if category == "Cf":
        return ""
    if category in ("Zl", "Zp"):
        return "\n"
    if category in ("Zs", "Cc"):
        return " "
    if category == "Pd":
        return "-"
    if not text.isascii() and category in ("Ps", "Pe"):
        return "(" if category == "Ps" else ")"
    return text


def _without_html(text: str) -> str:
    text = _ENTITY.sub(lambda entity: _plain_characters(html.unescape(entity[0])), text)
    text = _SPECIAL_TOKEN.sub("", text)
    text = _ANSWER_TAG.sub(lambda tag: "\n" if tag[1] or tag[2] else "\nAnswer: ", text)
    text = _BREAK_TAG.sub("\n", text)
    text = text.replace("<sup>", "^").replace("</sup>", "")
    text = text.replace("<sub>", "").replace("</sub>", "")
    return _TAG.sub("**", text)


def _without_markdown(text: str) -> str:
    text = _STRUCK.sub("", _FENCE.sub("", text))
    text = _EMPHASISED_LETTER.sub(r"(\1)", _LINE_MARK.sub("", text))
    return _MARKS.sub("", text)


def _without_latex(text: str) -> str:
    text = _NO_ESCAPE.sub(r"\\boxed", _DOUBLE_ESCAPE.sub("", text))
    text = text.replace("\\\\", "\n").replace("\\%", "%").replace("\\$", "").replace("$", "")
    text = _EMPHASISED_LATEX.sub(r"(\1)", _DIGIT_SPACE.sub("", text))
    text = _FONT.sub("", _SPACING.sub(" ", text))
    text = _FRACTION.sub(_fraction, text)
    text = _ROOT.sub(lambda root: f"√{_grouped(root[1], _ONE_FACTOR)}", text)
    text = _POWER.sub(lambda power: f"^{_grouped(power[1], _ONE_FACTOR)}", text)
    # Braces end a command's name: \mu{C}.
    text = _boxes_marked(_COMMAND.sub(_command, text))
    return text.replace("^°", "°").replace("\\", "")


def _fraction(found: re.Match) -> str:
    above, below = found.group(1, 2) if found[3] is None else found.group(3, 4)
    return f" {_grouped(above, _ONE_TERM)}/{_grouped(below, _ONE_TERM)}"


def _grouped(part: str, simple: re.Pattern) -> str:
    part = part.strip()
    return part if simple.fullmatch(part) else f"({part})"


def _command(found: re.Match) -> str:
    name = found[1]
    return _COMMANDS.get(name) or greek_letter(name) or name


def greek_letter(name: str) -> str | None:
    """The letter that a LaTeX command shows, such as `alpha` or `Delta`; None for another one."""
    size = "SMALL" if name[0].islower() else "CAPITAL"
    unicode_name = name.upper().replace("LAMBDA", "LAMDA")
    try:
        return unicodedata.lookup(f"GREEK {size} LETTER {unicode_name}")
    except KeyError:
        return None


def _boxes_marked(text: str) -> str:
    r"""The text without braces, those of `\boxed{}` replaced by BOX and BOX_END."""
    is_box: list[bool] = []

    def mark(found: re.Match) -> str:
        token = found[0]
        if found[1]:
            return f"{BOX}{found[1]}{BOX_END}"
        if token == "}":
            return BOX_END if is_box and is_box.pop() else ""
        if token == "{" or token.startswith("\\boxed"):
            is_box.append(token != "{")
            return BOX if token != "{" else ""
        return ""  # an escaped brace

    return _BOX_OR_BRACE.sub(mark, text)
