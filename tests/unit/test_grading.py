"""Grading against MMMU's published rules, on a written table; where it differs, on purpose."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreamprm_dist.errors import RecordError
from dreamprm_dist.evaluation.grading import grade, parse_choice

OPTIONS = ["a red fox", "a blue whale", "10 km", "100 km"]

# MMMU's rules (Yue et al., arXiv:2311.16502), None where they would draw at random.


def mmmu_choice(response: str, options: list[str]) -> str | None:
    for mark in ",.!?;:'":
        response = response.strip(mark)
    response = f" {response} "
    letters = "ABCDEFGHIJ"[: len(options)]
    for form in ("({})", " {} "):
        last = {x: response.rfind(form.format(x)) for x in letters}
        if any(place >= 0 for place in last.values()):
            return max(letters, key=last.__getitem__)
    if len(response.split()) > 5:
        places = [response.lower().rfind(option.lower()) for option in options]
        if max(places) >= 0:
            return letters[places.index(max(places))]
    return None


def mmmu_open(response: str, answer: str) -> bool:
    response = response.strip().strip(".").lower()
    lines, keys, found = response.split("\n"), [*mmmu_keys], []
    for i, line in enumerate(lines):
        if i == len(lines) - 1:
            keys.append("=")
        tails = [line.split(key)[-1].strip() for key in keys if key in line]
        if tails and min(tails, key=len) not in [*":,.!?;'", ""]:
            found.append(min(tails, key=len))
    found = found or [response]
    numbers = [number for text in found for number in mmmu_numbers(text)]
    gold = eval(answer) if answer.startswith("[") else [answer]
    have = [x for text in found + numbers for x in mmmu_normal(text)]
    want = [x for text in gold for x in mmmu_normal(text)]
    return any(
        any(isinstance(w, str) and w in h for w in want) if isinstance(h, str) else h in want
        for h in have
    )


mmmu_keys = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")


def mmmu_numbers(text: str) -> list[str]:
    commas = re.findall(r"-?\b\d{1,3}(?:,\d{3})+\b", text)
    scientific = re.findall(r"-?\d+(?:\.\d+)?[eE][+-]?\d+", text)
    simple = re.findall(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])", text)
    return commas + scientific + simple


def mmmu_normal(text: str) -> list:
    try:
        return [round(float(text.strip().replace(",", "")), 2)]
    except ValueError:
        text = text.strip().lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


# (solution, the letter it chooses or None: unparsed); MMMU's rules say the same.
CHOICES = [
    ("A", "A"),
    ("D", "D"),
    ("B.", "B"),
    ("(C)", "C"),
    ("(C).", "C"),
    (" B ", "B"),
    ("C,", "C"),
    ("'D'", "D"),
    ("B!", "B"),
    ("E", None),
    ("(E)", None),
    ("", None),
    ("?", None),
    ("...", None),
    ("Answer: A", "A"),
    ("Answer: D", "D"),
    ("Answer: (B)", "B"),
    ("Answer: (B).", "B"),
    ("Answer: C.", "C"),
    ("Answer: (D) 100 km", "D"),
    ("Answer: (A) a red fox", "A"),
    ("Answer: E", None),
    ("Answer: none", None),
    ("[Reasoning]\nIt swims.\n\nAnswer: B", "B"),
    ("[Reasoning]\nIt swims.\n\nAnswer: (B)", "B"),
    ("It is not (A), it is (B)", "B"),
    ("(A) is wrong, (C) is wrong, (D) is right", "D"),
    ("(D) would be too far. Hence (C).", "C"),
    ("The correct option: (A)", "A"),
    ("So I choose D", "D"),
    ("I would say B here", "B"),
    ("First A then C", "C"),
    ("It is C for sure", "C"),
    ("Between A and B I choose B", "B"),
    ("I cannot tell", None),
    ("No idea at all", None),
    ("It may be one of several animals that live in water", None),
    ("What the picture shows is clearly a blue whale", "B"),
    ("What the picture shows is clearly one Blue Whale", None),
    ("What it shows, most clearly, is a Blue Whale", "B"),
    ("There is a red fox, or rather there is a blue whale", "B"),
    ("There is a blue whale, or rather there is a red fox", "A"),
    ("The way from here to there measures 100 km", "D"),
    ("So I take the last of these, 100 km", "D"),
    ("The way from here to there measures 10 km in all", "C"),
    ("The fox is not to be seen in this picture", None),
    ("Answer: (C)\nbecause the scale says so", "C"),
    ("I think the answer is (D), not (C)? No: (D)", "D"),
    ("Answer: (C) 10 km", "C"),
    ("It says 10 meters in one place and 100 in another", None),
]
# (solution, what it chooses, and what it would be by MMMU's rules)
CHOICES_ON_PURPOSE = [
    ("Answer: (A) or (B)", None, "B"),  # several options are no answer
    ("Answer: A and B", None, "B"),
    ("Answer: A, no B", None, "B"),
    ("I thought of (A).\n\nAnswer: none of them", None, "A"),  # only the answer counts
    ("Not (A), not (B).\n\nAnswer:", None, "B"),
    ("First (D), but\n\nAnswer: C", "C", "D"),
    ("Answer: b", "B", None),  # a small letter
    ("b", "B", None),
    ("Answer: **B**", "B", None),  # what stands around it
    ("**Answer:** B.", "B", "B"),
    ("Answer: $D$", "D", None),
    ("Answer: \\boxed{C}", "C", None),
    ("So it is \\boxed{C}", "C", None),
    ("Answer: B. a blue whale", "B", None),  # `B.` and `B:`
    ("Answer: B) a blue whale", "B", None),
    ("The answer is B, as was said", "B", None),
    ("Answer: a blue whale", "B", None),  # the option's text, however short the response
    ("a blue whale", "B", None),
    ("A very long way of 10 km in all", "C", "A"),  # the article
    ("It measures exactly 100 km, all in all", "D", "D"),
    ("Here one sees a blue whales' skeleton, not more", None, "B"),  # whole words
]

# (solution, the answer, whether it is right or None: unparsed); MMMU's rules say the same.
OPEN = [
    ("42", "42", True),
    ("42.0", "42", True),
    ("41", "42", False),
    ("The result is 42", "42", True),
    ("The result is 42.", "42", True),
    ("So the sum is 1,234", "1234", True),
    ("So the sum is 1,234 apples", "1234", True),
    ("x = 3.14159", "3.14", True),
    ("x = 3.15", "3.14", False),
    ("x = 3.141", "3.14", True),
    ("2 + 2 = 4", "4", True),
    ("2 + 2 = 5", "4", False),
    ("-5", "-5", True),
    ("5", "-5", False),
    ("It is -5 degrees", "-5", True),
    ("It is 5 degrees", "-5", False),
    ("It is 1.5e3 in all", "1500", True),
    ("It is .5 of it", "0.5", True),
    ("Therefore the answer is 7 or so", "7", True),
    ("The first is 3\nThe second is 4", "3", True),
    ("The first is 3\nThe second is 4", "4", True),
    ("The first is 3\nThe second is 4", "5", False),
    ("x = 3\ny = 4", "4", True),
    ("x = 3\ny = 4", "3", False),
    ("12 + 30 = 42", "12", False),
    ("Paris", "paris", True),
    ("It could be Paris", "Paris", True),
    ("It could be Paris.", "Paris", True),
    ("It is Rome", "Paris", False),
    ("Paris is nice, but it is Rome", "Paris", False),
    ("mitochondria", "Mitochondria", True),
    ("Thus the organ is the left kidney", "left kidney", True),
    ("Thus the organ is the right kidney", "left kidney", False),
    ("yes", "no", False),
    ("x", "x", True),
    ("It is the x axis", "x", True),
    ("It is the y axis", "x", False),
    ("It is 0.5", "['0.5', '1/2']", True),
    ("It is 1/2", "['0.5', '1/2']", True),
    ("It is 1/3", "['0.5', '1/2']", False),
    ("It is a half", "['0.5', 'half']", True),
    ("Final answer: 8", "8", True),
    ("final 8", "8", True),
    ("1.005", "1.0", True),
    ("12.3456", "12.35", True),
    ("100", "10", False),
    ("so what", "42", False),
    ("The answer is twelve", "12", False),
    ("12", "twelve", False),
    ("Answer: 42", "42", True),
    ("Answer: Paris", "Paris", True),
    ("Answer: Rome", "Paris", False),
    ("[Reasoning]\nIt grows.\n\nAnswer: 3.5 m", "3.5", True),
]
# (solution, the answer, whether it is right, and by MMMU's rules)
OPEN_ON_PURPOSE = [
    ("", "42", None, False),  # there is nothing to read
    ("...", "42", None, False),
    ("It is 42.\n\nAnswer: 41", "42", False, True),  # only the answer counts
    ("It is Paris.\n\nAnswer:", "Paris", None, True),
    ("Answer: \\boxed{42}", "42", True, True),
    ("Answer: $\\text{Paris}$", "paris", True, True),
    ("It is colored", "red", False, True),  # whole words
    ("It is the city of Paris in France", "Paris", True, False),  # ... also before the answer
    ("The basis 5, or 6", "6", True, True),
    ("It is 100 km", "10 km", False, False),
    ("It is 110 km", "10 km", False, True),
    ("It is scarlet", "car", False, True),
    ("0.001", "0.004", False, True),  # both are 0.00
    ("0.00401", "0.004", True, True),
    ("5kg", "5", True, False),  # the number of `5kg`
    ("It is CO2", "2", False, True),  # and none of `CO2`
    ("nan", "nan", True, False),
    ("\N{MINUS SIGN}5", "-5", True, False),
]


@pytest.mark.parametrize(("solution", "letter"), CHOICES)
def test_choices_as_by_mmmu(solution: str, letter: str | None) -> None:
    assert parse_choice(solution, OPTIONS) == letter
    assert mmmu_choice(solution, OPTIONS) == letter


@pytest.mark.parametrize(("solution", "letter", "by_mmmu"), CHOICES_ON_PURPOSE)
def test_choices_that_differ(solution: str, letter: str | None, by_mmmu: str | None) -> None:
    assert parse_choice(solution, OPTIONS) == letter
    assert mmmu_choice(solution, OPTIONS) == by_mmmu


@pytest.mark.parametrize(("solution", "answer", "right"), OPEN)
def test_open_questions_as_by_mmmu(solution: str, answer: str, right: bool) -> None:
    assert grade(solution, answer) is right
    assert mmmu_open(solution, answer) is right


@pytest.mark.parametrize(("solution", "answer", "right", "by_mmmu"), OPEN_ON_PURPOSE)
def test_open_questions_that_differ(solution, answer, right, by_mmmu) -> None:
    assert grade(solution, answer) is right
    assert mmmu_open(solution, answer) is by_mmmu


def test_the_table_is_long() -> None:
    tables = (CHOICES, CHOICES_ON_PURPOSE, OPEN, OPEN_ON_PURPOSE)
    assert len({case[:2] for table in tables for case in table}) >= 130


def test_a_choice_is_right_when_it_is_the_answer() -> None:
    assert grade("Answer: B", "B", OPTIONS) is True
    assert grade("Answer: C", "B", OPTIONS) is False
    assert grade("Answer: whatever", "B", OPTIONS) is None


@pytest.mark.parametrize(
    "options", [["", "x"], ["x", "x"], ["B", "A"], ["1", "2"] * 13, ["1"] * 30]
)
def test_odd_options(options: list[str]) -> None:
    for letter in "AB":
        assert parse_choice(f"Answer: {letter}", options) == letter
    assert parse_choice("Answer: something else", options) is None


def test_equal_or_empty_options_are_not_found_by_their_text() -> None:
    assert parse_choice("Answer: x", ["x", "x"]) is None
    assert parse_choice("Answer: x", ["", "x"]) == "B"


@given(st.text(), st.lists(st.text(max_size=5), max_size=6), st.text("1.[' a", min_size=1))
def test_any_text_is_graded_without_error_and_always_the_same(solution, options, answer) -> None:
    key = "A" if options else f"{answer}x"
    assert grade(solution, key, options) is grade(solution, key, options)
    assert parse_choice(solution, options) in {None, *"ABCDEF"[: len(options)]}


def test_a_key_that_is_no_option_is_an_error() -> None:
    with pytest.raises(RecordError, match="'E' is none of the 4 options"):
        grade("Answer: B", "E", OPTIONS)
