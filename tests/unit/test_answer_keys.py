"""Options in every form of public files, and keys that are answers to their question."""

import json

import numpy as np
import pytest

from dreamprm_dist.errors import RecordError
from dreamprm_dist.evaluation.answer_keys import normal_key, parse_options, read_key

TEXTS = ["an oak, b. x", "it's, so, b. s", "1 m"]
LABELLED = list(zip("ABC", TEXTS, strict=True))


@pytest.mark.parametrize(
    "value",
    [
        TEXTS,
        tuple(TEXTS),
        str(TEXTS),
        f" {TEXTS} \n",
        """["an oak, b. x", "it's, so, b. s", "1 m"]""",  # JSON
        str(np.array(TEXTS)),
        repr(np.array(TEXTS, dtype=object)),
        "['an oak, b. x'\n \"it's, so, b. s\" '1 m']",
        "\n".join(TEXTS),
        "\n".join(f"- {text}" for text in TEXTS),
        "\n".join(f"{i}. {text}" for i, text in enumerate(TEXTS, 1)),
        "\n\n".join(f"{x}. {text}" for x, text in LABELLED),
        " ".join(f"({x}) {text}" for x, text in LABELLED),
        "Options: " + ", ".join(f"({x}) {text}" for x, text in LABELLED),
        "Choices:\n" + "\n".join(f"{x.lower()}) {text}" for x, text in LABELLED),
        " ".join(f"{x}: {text}" for x, text in LABELLED),
        dict(LABELLED),
        dict(LABELLED[::-1]),
        str(dict(LABELLED)),
        {**dict(LABELLED), "D": None},
        {"text": TEXTS, "label": ["A", "B", "C"]},
        {"label": ["2", "1", "3"], "text": [TEXTS[1], TEXTS[0], TEXTS[2]]},
        [{"label": x, "text": text} for x, text in LABELLED],
        [{"key": x, "value": text} for x, text in LABELLED[::-1]],
        [{x: text} for x, text in LABELLED],
        [f"{x}. {text}" for x, text in LABELLED],
        str([f"({x}) {text}" for x, text in LABELLED]),
        "\n".join(f"{x}、{text}" for x, text in LABELLED),
        "\n".join(f"（{x}）{text}" for x, text in LABELLED),
        " ".join(f"{x}．{text}" for x, text in LABELLED),
        [f"{x}：{text}" for x, text in LABELLED],
    ],
)
def test_options_are_read_in_every_form(value: object) -> None:
    assert parse_options(value) == TEXTS


def test_labels_without_a_space_behind_them() -> None:
    assert parse_options("A.猫\nB.狗") == parse_options(["A.猫", "B.狗"]) == ["猫", "狗"]
    assert parse_options(["A.D.", "B.C."]) == ["A.D.", "B.C."]


def test_latex_in_a_spelled_list_is_no_control_character() -> None:
    for written in (
        r"\frac12",
        r"\times",
        r"\beta",
        r"\alpha",
        r"\nu",
        r"\right)",
        r"\underline x",
    ):
        for spelled in (f"['{written}', 'x']", f'["{written}", "x"]'):
            assert parse_options(spelled) == [written, "x"]
        assert parse_options(str([written, "x"])) == [written, "x"]
        assert parse_options(json.dumps([written, "x"])) == [written, "x"]
    assert parse_options(r'["one\nline", "\u00e9t\uff08"]') == ["one\nline", "ét（"]


@pytest.mark.parametrize("value", [None, "", " ", [], "[]", {}])
def test_no_options(value: object) -> None:
    assert parse_options(value) == []


@pytest.mark.parametrize(
    "value", [["A", "B"], ["A. x", "y"], ["A vitamin", "B vitamin"], ["", "x"]]
)
def test_letters_that_are_no_labels_stay(value: list[str]) -> None:
    assert parse_options(value) == value


@pytest.mark.parametrize(
    "value",
    [
        "[1, 2]", [1, 2], 5, "a, b", "A. only", "['a', 'b'", "['a' 'b', 'c']", "['a' ... 'b']",
        "[" * 99_000, "(" * 99_000, "['a'" * 20_000, "['a' " * 20_000, "x" * 100_001, [["a"]],
        ["x"] * 27, str(["a"] * 27), "\n".join("x" * 27), {"A": "x", "C": "y"}, {"A": 1},
        {"label": ["A"], "text": ["x", "y"]}, [{"a": 1, "b": 2}], ["B. x", "A. y"],
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_bad_options(value: object) -> None:
    with pytest.raises(RecordError, match="'options'"):
        parse_options(value)


OPTIONS = ["red", "Green tea", "Vitamin A", "1/2"]


@pytest.mark.parametrize(
    ("answer", "accepted"),
    [
        *[(key, ["B"]) for key in (
            "B", "b", "(B)", " b. ", "B)", "[b]", "**B**", "$B$", "Ｂ", "Option B", "Answer: B",
            r"\boxed{B}", "green  tea", "Green tea.", "(B) green tea", "B: Green tea", ["B"],
            "B - Green tea", "B、Green tea", "ⓑ",
            "['b']",
        )],
        ("Vitamin A", ["C"]),
        ("0.5", ["D"]),
        (0.5, ["D"]),
        (["A", "Green tea", "a"], ["A", "B"]),  # any of them is right, in MMMU's evaluation too
        ('["A", "C"]', ["A", "C"]),
    ],
)  # fmt: skip
def test_keys_of_choices(answer: object, accepted: list[str]) -> None:
    assert read_key(answer, OPTIONS) == accepted


@pytest.mark.parametrize(
    ("answer", "accepted"),
    [("x", ["x"]), (42, ["42"]), ("['0.5', '1/2']", ["0.5", "1/2"]), (["a", 1], ["a", "1"]),
     ("[0, 1)", ["[0, 1)"]), ("[1, 2]", ["[1, 2]"]), ("['a' 'b']", ["a", "b"])],
)  # fmt: skip
def test_keys_of_open_questions(answer: object, accepted: list[str]) -> None:
    assert read_key(answer, []) == accepted
    assert read_key(normal_key(answer, []), []) == accepted


@pytest.mark.parametrize(
    ("answer", "options", "reason"),
    [
        ("E", OPTIONS, "none of the 4 options; give a letter from A to D"),
        ("2", OPTIONS, "none of the 4 options"),
        ("yellow", OPTIONS, "none of the 4 options"),
        ("A or B", OPTIONS, "none of the 4 options"),
        ("A, B", OPTIONS, "none of the 4 options"),
        ("B. red", OPTIONS, "none of the 4 options"),
        (["A", "E"], OPTIONS, "'E' is none"),
        ("?", OPTIONS, "none of the 4 options"),
        ("tea", ["tea", "Tea", "milk"], "options A and B; give the letter"),
        ("", OPTIONS, "empty"),
        ([], OPTIONS, "empty"),
        ("  ", [], "empty"),
        (None, [], "must be a text"),
        (True, OPTIONS, "must be a text"),
        (float("nan"), [], "must be a text"),
        ({"A": 1}, [], "must be a text"),
    ],
)
def test_keys_that_are_no_answer(answer: object, options: list[str], reason: str) -> None:
    with pytest.raises(RecordError, match=reason):
        read_key(answer, options)


def test_a_letter_rules_over_an_option_that_is_a_letter() -> None:
    assert read_key("A", ["B", "A"]) == ["A"]
