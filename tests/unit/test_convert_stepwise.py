"""Step labels of TRL, PRM800K and Math-Shepherd, in files as they are published."""

import json
import re
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from json_lines import lines, write
from PIL import Image

from data_tools.convert import main
from data_tools.shard import shard_file
from dreamprm_dist.data.schema import parse_training_record
from dreamprm_dist.errors import InputError
from dreamprm_dist.prm.solutions import SYSTEM_PROMPT, steps_conversation

BLUE = {
    "prompt": "Blue is to sky as green is to what?",
    "completions": ["Sky is blue.", "Grass is green.", "So: water."],
    "labels": [True, True, False],
}


def convert(command: str, source: Path, *flags: str) -> tuple[list[dict], list[dict]]:
    """What is written and what is rejected."""
    out = source.parent / "out" / "records.jsonl"
    main([command, str(source), "--out", str(out), "--overwrite", *flags])
    return lines(out), lines(out.with_suffix(".rejected.jsonl"))


def told(record: dict) -> tuple[str, list[tuple[str, str | None]]]:
    """The question of a training record, and its steps with their labels."""
    system, question, *turns = record["conversations"]
    assert system == {"from": "system", "value": SYSTEM_PROMPT}
    assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
    values = [turn["value"] for turn in turns]
    return question["value"], list(zip(values[::2], values[1::2], strict=True))


# TRL


def test_stepwise_supervision_becomes_training_records(tmp_path):
    named = {"id": "q7", "dataset": "analogies", "images": ["a.png", "b.png"], **BLUE}
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    Image.new("RGB", (9, 9)).save(tmp_path / "b.png")
    unlabelled = BLUE | {"labels": [1, 0, None], "prompt": " What?\n", "index": 3}
    source = write(tmp_path / "trl.jsonl", [BLUE, named, unlabelled])
    written, rejected = convert("stepwise", source)
    assert not rejected
    expected = steps_conversation(BLUE["prompt"], BLUE["completions"], labels=["+", "+", "-"])
    assert expected[1]["value"] == f"### Question:\n{BLUE['prompt']}"
    assert written[0] == {"id": "trl.jsonl:1", "dataset": "trl", "conversations": expected}
    assert written[1] == {
        "id": "q7",
        "image": ["../a.png", "../b.png"],
        "dataset": "analogies",
        "conversations": expected,
    }
    assert told(written[2]) == (
        "### Question:\nWhat?",
        [("Sky is blue.", "+"), ("Grass is green.", "-"), ("So: water.", None)],
    )
    # And what it wrote can be sharded.
    manifest = shard_file(tmp_path / "out" / "records.jsonl", tmp_path / "shards", "training", 1)
    assert manifest["num_rows"] == 3


@pytest.mark.parametrize(
    ("flaw", "reason"),
    [
        ({"labels": [True, True]}, "'labels' has 2 entries for 3 completions"),
        ({"labels": [True] * 4}, "'labels' has 4 entries for 3 completions"),
        ({"labels": None}, "'labels' has no entries for 3 completions"),
        ({"labels": [True, "+", False]}, r"labels\[1\] must be true, false or null, not '\+'"),
        ({"labels": [True, 2, False]}, r"labels\[1\] must be true"),
        ({"completions": []}, "'completions' must be a non-empty list"),  # TRL's script wrote some
        ({"completions": ["a", " ", "b"]}, r"completions\[1\] must be a text"),
        ({"prompt": ""}, "'prompt' must be a text"),
        ({"prompt": [{"role": "user", "content": "?"}]}, "'prompt' must be a text"),
        ({"images": [{"bytes": "…", "path": None}]}, "'image' must be text"),
    ],
)
def test_what_stepwise_supervision_lacks_is_said(tmp_path, flaw, reason):
    source = write(tmp_path / "trl.jsonl", [BLUE | {"id": 4} | flaw, BLUE])
    written, (rejected,) = convert("stepwise", source)
    assert [record["id"] for record in written] == ["trl.jsonl:2"]
    assert (rejected["file"], rejected["line"], rejected["id"]) == (str(source), 1, 4)
    assert re.search(reason, rejected["reason"])


@pytest.mark.parametrize("kind", ["parquet", "folder", "saved", "list"])
def test_layouts_of_stepwise_supervision(tmp_path, kind):
    """As trl-lib's data sets are downloaded, and as `save_to_disk` leaves them."""
    rows = [BLUE, BLUE | {"completions": [], "labels": []}, BLUE | {"prompt": "Why?"}]
    table = pa.table({key: [row[key] for row in rows] for key in BLUE})
    root = tmp_path / "math_shepherd"
    root.mkdir()
    source, flags, name = root, ["--split", "test"], "test-00000-of-00001.parquet"
    if kind in ("parquet", "folder"):
        (root / "data").mkdir()
        for split in ("train", "test"):
            pq.write_table(table, root / "data" / f"{split}-00000-of-00001.parquet")
        place = root / "data" / name
        if kind == "parquet":
            source, flags = place, []
    elif kind == "saved":
        splits = {s: datasets.Dataset.from_list(rows) for s in ("train", "test")}
        datasets.DatasetDict(splits).save_to_disk(str(root))
        place = root / "test"
    else:
        source = place = root / "rows.json"
        source.write_text(json.dumps(rows))
        flags = []
    out = tmp_path / "out.jsonl"
    main(["stepwise", str(source), "--out", str(out), *flags])
    written = lines(out)
    assert [record["id"] for record in written] == [f"{place.name}:1", f"{place.name}:3"]
    assert {record["dataset"] for record in written} == {source.stem}
    assert told(written[0])[1] == [
        ("Sky is blue.", "+"), ("Grass is green.", "+"), ("So: water.", "-")
    ]  # fmt: skip
    (rejected,) = lines(out.with_suffix(".rejected.jsonl"))
    assert (rejected["file"], rejected["line"]) == (str(place), 2)
    main(["stepwise", str(source), "--out", str(out), "--overwrite", "--limit", "1", *flags])
    assert len(lines(out)) == 1
    if kind in ("folder", "saved"):
        with pytest.raises(InputError, match="with --split: test, train"):
            main(["stepwise", str(source), "--out", str(out), "--overwrite"])
        with pytest.raises(InputError, match=r"no column 'input' .*Math-Shepherd has input, label"):
            main(["math_shepherd", str(source), "--out", str(out), "--overwrite", *flags])


def training(labels, **fields):
    steps = [f"step {i}" for i in range(1, len(labels) + 1)]
    return {"id": 5, "conversations": steps_conversation("Q", steps, labels=labels)} | fields


def test_training_records_become_stepwise_supervision(tmp_path, capsys):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    visual = {  # VisualPRM's first turn holds the first step
        "conversations": [
            {"from": "human", "value": "### Question:\nQ?\n\n### Solution Process:\nfirst"},
            {"from": "gpt", "value": "+"},
            {"from": "human", "value": "second"},
            {"from": "human", "value": "and more"},
            {"from": "gpt", "value": "-"},
        ]
    }
    records = [
        training(["+", "-"], dataset="d", image="a.png"),
        visual,
        training(["+", "-", None, None]),
        training([None, "-"]),
        training([None, None]),
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "+"}]},
        BLUE,
    ]
    source = write(tmp_path / "mine.jsonl", records)
    written, rejected = convert("to_stepwise", source)
    two = {"prompt": "Q", "completions": ["step 1", "step 2"], "labels": [True, False]}
    assert written == [
        {"id": 5, "dataset": "d", "images": ["../a.png"], **two},
        {
            "prompt": "Q?",
            "completions": ["first", "second\nand more"],
            "labels": [True, False],
            "id": "mine.jsonl:2",
        },
        {"id": 5, **two},
    ]
    assert [r["line"] for r in rejected] == [4, 5, 6, 7]
    for one, reason in zip(
        rejected, ["step 1 of 2 is", "every step is", "step 1 must be", "'conversations'"],
        strict=True,
    ):  # fmt: skip
        assert reason in one["reason"]
    said = capsys.readouterr().out
    assert "3 records, 4 rejected" in said
    assert "2 unlabelled steps cut off the ends of 1 of the solutions" in said


def test_there_and_back_is_the_same(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    rows = [BLUE | {"id": "x", "dataset": "d", "images": ["a.png"]}, BLUE | {"id": 2}]
    write(tmp_path / "trl.jsonl", rows)
    one, two = tmp_path / "there" / "a.jsonl", tmp_path / "back.jsonl"
    main(["stepwise", str(tmp_path / "trl.jsonl"), "--out", str(one)])
    main(["to_stepwise", str(one), "--out", str(two)])
    rows[0]["images"] = ["there/../a.png"]
    assert lines(two) == [rows[0], rows[1] | {"dataset": "trl"}]


# PRM800K


def completion(text, rating, flagged=None):
    return {"text": text, "rating": rating, "flagged": flagged}


def step(*completions, chosen=None, human=None):
    return {
        "completions": list(completions),
        "human_completion": human,
        "chosen_completion": chosen,
    }


def solution(*steps, reason="solution", **fields):
    """A line of PRM800K with all of its fields."""
    return {
        "labeler": "340d89bc-f5b7-45e9-b272-909ba68ee363",
        "timestamp": "2023-01-22T04:34:27.052924",
        "generation": None,
        "is_quality_control_question": False,
        "is_initial_screening_question": False,
        "question": {
            "problem": "What is $1+1$?",
            "ground_truth_solution": "It is $\\boxed{2}$.",
            "ground_truth_answer": "2",
        },
        "label": {"steps": list(steps), "total_time": 278270, "finish_reason": reason},
        **fields,
    }


WRITTEN = {"text": "Written.", "rating": None, "source": "human", "flagged": None}
# Phase 1: alternatives anywhere, a step that the labeler wrote, and a rating that is missing.
PHASE1 = solution(
    step(completion("One.", 1), completion("Wrong.", -1), completion("Idle.", 0), chosen=0),
    step(completion("Bad.", -1), completion("Unsure.", 1, flagged=True), human=WRITTEN),
    step(completion("Unrated.", None), chosen=0),
    step(completion("# Answer\n\n2", 1), chosen=0),
)
# Phase 2 ends with the first error and the alternatives to it.
PHASE2 = solution(
    step(completion("One.", 1), chosen=0),
    step(completion("Idle.", 0), chosen=0),
    step(completion("False.", -1), completion("Right.", 1, flagged=False)),
    reason="found_error",
)


def test_prm800k_gives_a_record_for_each_solution(tmp_path):
    written, rejected = convert("prm800k", write(tmp_path / "phase1_train.jsonl", [PHASE1, PHASE2]))
    assert not rejected
    assert {told(record)[0] for record in written} == {"### Question:\nWhat is $1+1$?"}
    assert {record["dataset"] for record in written} == {"phase1_train"}
    ids = [f"phase1_train.jsonl:{line}.{k}" for line, count in ((1, 4), (2, 2)) for k in
           range(1, count + 1)]  # fmt: skip
    assert [record["id"] for record in written] == ids
    assert [told(record)[1] for record in written] == [
        [("Wrong.", "-")],
        [("Idle.", "+")],
        [("One.", "+"), ("Bad.", "-")],
        [("One.", "+"), ("Written.", "+"), ("Unrated.", None), ("# Answer\n\n2", "+")],
        [("One.", "+"), ("Idle.", "+"), ("False.", "-")],
        [("One.", "+"), ("Idle.", "+"), ("Right.", "+")],
    ]
    for record in written:
        parse_training_record(record)


@pytest.mark.parametrize(
    ("neutral", "label", "others"),
    [("plus", "+", 2), ("minus", "-", 2), ("unlabelled", None, 1)],
)
def test_what_a_neutral_rating_is(tmp_path, neutral, label, others):
    """Where it is unlabelled, one that was not followed is no record: it would teach nothing."""
    line = solution(step(completion("Idle.", 0), completion("x", 0), completion("y", 1), chosen=0))
    written, _ = convert("prm800k", write(tmp_path / "a.jsonl", [line]), "--neutral", neutral)
    *alternatives, path = (told(record)[1] for record in written)
    assert path == [("Idle.", label)] and len(alternatives) == others
    assert alternatives[-1] == [("y", "+")]
    source = write(tmp_path / "b.jsonl", [solution(step(human=WRITTEN))])
    assert told(convert("prm800k", source, "--neutral", neutral)[0][0])[1] == [("Written.", "+")]


def test_each_rating_is_a_label_once(tmp_path):
    source = write(tmp_path / "a.jsonl", [PHASE1, PHASE2])
    written, _ = convert("prm800k", source, "--label_once")
    assert [told(record)[1] for record in written[2:]] == [
        [("One.", None), ("Bad.", "-")],
        [("One.", "+"), ("Written.", "+"), ("Unrated.", None), ("# Answer\n\n2", "+")],
        [("One.", None), ("Idle.", None), ("False.", "-")],
        [("One.", None), ("Idle.", None), ("Right.", "+")],
        [("One.", "+"), ("Idle.", "+")],
    ]


def test_prm800k_lines_that_are_no_solutions(tmp_path):
    good = step(completion("One.", 1), chosen=0)
    flawed = {
        "every labeler was given": solution(good, is_quality_control_question=True),
        "labelers were chosen": solution(good, is_initial_screening_question=True),
        "reported the problem as broken": solution(good, reason="bad_problem"),
        "gave up": solution(good, reason="give_up"),
    }
    broken = {
        "no step that was rated": solution(step(completion("One.", None))),
        "no step that": solution(),
        "completions must be a list": solution(step() | {"completions": "One."}),
        "chosen_completion is 1, but there are 1": solution(step(completion("One.", 1), chosen=1)),
        r"completions[0].rating must be 1, 0, -1 or null, not 2": solution(
            step(completion("One.", 2), chosen=0)
        ),
        r"steps[0].completions[0].text must be": solution(step(completion("", 1), chosen=0)),
        "human_completion must be": solution(step(human={"text": ""})),
        "question.problem must be": solution(good, question={"problem": None}),
        "'question' and 'label' must be objects": BLUE,
        "label.steps must be": solution(good, label={"steps": None}),
    }
    source = write(tmp_path / "a.jsonl", [*flawed.values(), *broken.values(), PHASE2])
    written, rejected = convert("prm800k", source)
    assert len(written) == 2
    for line, (one, reason) in enumerate(zip(rejected, flawed | broken, strict=True), start=1):
        assert one["line"] == line and reason in one["reason"]
    written, rejected = convert("prm800k", source, "--unfiltered")
    assert len(written) == 4 + 2 and len(rejected) == len(broken)


def test_a_path_ends_where_nothing_was_chosen(tmp_path):
    """By a labeler who gave up, by completions that are null, or by one that was not rated."""
    nothing = {"completions": None, "human_completion": None, "chosen_completion": None}
    ends = [nothing, step(completion("Unrated.", None)), step()]
    records = [
        solution(step(completion("One.", 1), chosen=0), end, step(human="x")) for end in ends
    ]
    records.append(solution(step(human="By hand.")))
    written, rejected = convert("prm800k", write(tmp_path / "a.jsonl", records))
    assert not rejected
    assert [told(record)[1] for record in written] == [[("One.", "+")]] * 3 + [[("By hand.", "+")]]


# Math-Shepherd


QUESTION = "Janet pays $40/hour for 3 hours. How much is it? "


def shepherd(text: str, signs: str, **fields) -> dict:
    label = text
    for sign in signs:
        label = label.replace("ки", sign, 1)
    return {"input": text, "label": label, "task": "GSM8K", **fields}


def test_math_shepherd_is_read_as_it_is_published(tmp_path):
    text = f"{QUESTION}Step 1: 40 * 3 = <<40*3=120>>120 - 0 + 0. ки\nStep 2: The answer is: 120 ки"
    written, rejected = convert(
        "math_shepherd", write(tmp_path / "math-shepherd.jsonl", [shepherd(text, "+-")])
    )
    assert not rejected
    (record,) = written
    assert (record["id"], record["dataset"]) == ("math-shepherd.jsonl:1", "GSM8K")
    assert told(record) == (
        f"### Question:\n{QUESTION.strip()}",
        [("Step 1: 40 * 3 = <<40*3=120>>120 - 0 + 0.", "+"), ("Step 2: The answer is: 120", "-")],
    )


@pytest.mark.parametrize(
    ("text", "signs", "question", "steps"),
    [
        # The label has the mark too: so it is Cyrillic text.
        ("Что значит «руки»? Step 1: руки. ки\nStep 2: Да. ки", None, "Что значит «руки»?",
         [("Step 1: руки.", "+"), ("Step 2: Да.", "-")]),
        # The question asks for steps itself.
        ("Do Step 1: add. What? Step 1: a ки\nStep 2: b ки", "+-", "Do Step 1: add. What?",
         [("Step 1: a", "+"), ("Step 2: b", "-")]),
        ("What? step 1: a ки\nstep 2: b ки", "-+", "What?",
         [("step 1: a", "-"), ("step 2: b", "+")]),
        # A mark in the question.
        ("Mr. Rocky ran. ки\nHow far? Step 1: a ки", "+-", "Mr. Rocky ran. \nHow far?",
         [("Step 1: a", "-")]),
        ("Let $a$ be one. ки\nStep 1: a ки\nStep 2: b ки", "++-", "Let $a$ be one.",
         [("Step 1: a", "+"), ("Step 2: b", "-")]),
        # No first step by name.
        ("What? It is a. ки\nStep 2: as in step 1: b ки", "+-", "What?",
         [("It is a.", "+"), ("Step 2: as in step 1: b", "-")]),
        ("What? ки\nStep 2: b ки", "+-", "What?", [("Step 2: b", "-")]),
        # Without its last mark.
        ("What? Step 1: a ки\nStep 2: b", "+", "What?", [("Step 1: a", "+"), ("Step 2: b", None)]),
        ("What? Step 1: a ки\nStep 2: b ки \n", "+-", "What?",
         [("Step 1: a", "+"), ("Step 2: b", "-")]),
    ],
)  # fmt: skip
def test_quirks_of_math_shepherd(tmp_path, text, signs, question, steps):
    record = shepherd(text, signs or "")
    if signs is None:
        record["label"] = "Что значит «руки»? Step 1: руки. +\nStep 2: Да. -"
    written, rejected = convert("math_shepherd", write(tmp_path / "a.jsonl", [record]))
    assert not rejected
    assert told(written[0]) == (f"### Question:\n{question}", steps)


def test_a_sign_where_the_last_mark_is_missing(tmp_path):
    record = shepherd("What? Step 1: a ки\nStep 2: b", "+")
    record["label"] += " -"
    written, _ = convert("math_shepherd", write(tmp_path / "a.jsonl", [record]))
    assert told(written[0])[1] == [("Step 1: a", "+"), ("Step 2: b", "-")]


def test_math_shepherd_lines_that_do_not_match(tmp_path):
    good = shepherd("What? Step 1: a ки\nStep 2: b ки", "+-")
    text = good["input"]
    broken = [
        ("in step 2", good | {"label": "What? Step 1: a +\nStep 2: c -"}),
        ("in step 2", good | {"label": "What? Step 1: a +\nStep 2: b "}),
        ("in step 2", good | {"label": "What? Step 1: a +\nStep 2: b *"}),
        ("in step 1", good | {"label": "What?  Step 1: a +\nStep 2: b -"}),
        ("in step 1", good | {"label": ""}),
        ("behind the last step mark", good | {"label": good["label"] + " and more"}),
        ("behind the last step mark", good | {"label": good["label"] + " +"}),
        ("behind the last step mark", good | {"input": text + "\nStep 3: c"}),
        ("step 2 must be a text", shepherd("What? Step 1: a ки ки\nStep 2: b ки", "++-")),
        ("where the question ends", shepherd("Find it. It is. ки", "+")),
        ("where the question ends", shepherd("What? Or what? It is. ки", "+")),
        ("where the question ends", shepherd("", "")),
        ("'input' has no step", shepherd("What? ки", "+")),
        ("the question must be a text", shepherd("Step 1: a ки", "+")),
        ("'input' and 'label' must be texts", good | {"label": ["+", "-"]}),
    ]
    source = write(tmp_path / "a.jsonl", [record for _, record in broken] + [good])
    written, rejected = convert("math_shepherd", source)
    assert [record["id"] for record in written] == [f"a.jsonl:{len(broken) + 1}"]
    assert [one["line"] for one in rejected] == list(range(1, len(broken) + 1))
    for one, (reason, _) in zip(rejected, broken, strict=True):
        assert reason in one["reason"], one
