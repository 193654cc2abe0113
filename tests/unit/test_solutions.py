"""A solution's text: no character lost in splitting, the conversation."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreamprm_dist.data.schema import QUESTION_PREFIX
from dreamprm_dist.prm.solutions import (
    SYSTEM_PROMPT,
    split_steps,
    steps_conversation,
)


@pytest.mark.parametrize(
    ("solution", "steps"),
    [
        ("[Reasoning]\nOne.\n\nTwo.\n\nAnswer: B", ["One.", "Two.", "Answer: B"]),
        ("One.\nstill one.\nAnswer: B", ["One.\nstill one.", "Answer: B"]),
        ("The total is 42. Therefore it fits.", ["The total is 42. Therefore it fits."]),
        ("y = 12. Then\n\nx = 3) and 4. So", ["y = 12. Then", "x = 3) and 4. So"]),
        ("1. a\n2. b\n 3. c", ["1. a", "2. b\n 3. c"]),
        ("1.5 m\n2.5 m", ["1.5 m\n2.5 m"]),
        ("a\n \t\nb\n\n\n\nc", ["a", "b", "c"]),
        ("a\r\n\r\nb\r\nAnswer: C\r\n", ["a", "b", "Answer: C"]),
        ("a\n\nAnswer:\nC", ["a", "Answer: C"]),
        ("a\n\nAnswer:\n\nC", ["a", "Answer: C"]),
        ("a\n\n**Answer:**\n\nC", ["a", "**Answer:** C"]),
        ("a\n**Answer: C**", ["a", "**Answer: C**"]),
        ("a\n### Final Answer:\n\n42", ["a", "### Final Answer: 42"]),
        ("[Reasoning]\n\n[Reasoning] again", ["[Reasoning] again"]),
        ("The answer: none. Answer: is asked", ["The answer: none. Answer: is asked"]),
        ("A", ["A"]),
        ("[Reasoning]\n \n", []),
        ("", []),
    ],
)
def test_split_steps(solution: str, steps: list[str]) -> None:
    assert split_steps(solution) == steps


pieces = st.sampled_from(
    ["\n\n", "\n", " ", "42.", "1) ", "2. x", "Answer:", "Answer: B", "é", "-"]
)


@given(st.one_of(st.text(), st.lists(pieces, max_size=30).map("".join)))
def test_split_steps_loses_white_space_only(text: str) -> None:
    steps = split_steps("[Reasoning]\n" + text)
    assert "".join("".join(steps).split()) == "".join(text.split())
    assert all(step == step.strip() != "" for step in steps)


def test_conversation() -> None:
    turns = steps_conversation("What is it?", split_steps("[Reasoning]\nSee.\nAnswer: B"))
    assert turns == [
        {"from": "system", "value": SYSTEM_PROMPT},
        {"from": "human", "value": "### Question:\nWhat is it?"},
        {"from": "human", "value": "See."},
        {"from": "gpt", "value": None},
        {"from": "human", "value": "Answer: B"},
        {"from": "gpt", "value": None},
    ]


# --- the reference's records ---------------------------------------------------------------

# In these the reference's splitter took a number before a full stop or a parenthesis for a list
# item: it cut there and dropped the number ("y = 12. Then" became "y =" and "Then").
NUMBERS_LOST = {28, 32, 35, 44, 47, 64, 69, 72, 93, 95, 106, 111, 124, 128, 142, 148, 152, 153, 155}
LIST_NUMBER = re.compile(r"(?<!\S)\d+[.)](?!\S)")


@pytest.fixture(scope="module")
def records(reference_dir: Path) -> list[dict]:
    return json.loads((reference_dir / "mmmu_pro_meta_sample.json").read_text(encoding="utf-8"))


def human_turns(conversation: list[dict]) -> list[str]:
    return [turn["value"] for turn in conversation if turn["from"] == "human"]


def ours(record: dict) -> list[dict]:
    question = human_turns(record["conversations"])[0]
    assert question.startswith(QUESTION_PREFIX)
    return steps_conversation(
        question.removeprefix(QUESTION_PREFIX), split_steps(record["response"])
    )


def test_conversations_are_the_references(records: list[dict]) -> None:
    assert len(records) == 160
    for record in records:
        assert ours(record)[0] == record["conversations"][0]
    different = {
        index
        for index, record in enumerate(records)
        if human_turns(ours(record)) != human_turns(record["conversations"])
    }
    assert different == NUMBERS_LOST


def test_records_that_differ_do_so_by_lost_numbers(records: list[dict]) -> None:
    def characters(turns: list[str], pattern: re.Pattern = LIST_NUMBER) -> str:
        return "".join(pattern.sub(" ", "\n".join(turns)).split())

    never = re.compile(r"(?!)")
    for index in NUMBERS_LOST:
        our_turns = human_turns(ours(records[index]))
        their_turns = human_turns(records[index]["conversations"])
        assert characters(our_turns) == characters(their_turns), index
        assert len(characters(our_turns, never)) > len(characters(their_turns, never)), index
        assert characters(our_turns[1:], never).endswith(
            characters([records[index]["response"].removeprefix("[Reasoning]")], never)
        )
