"""Samples: balanced, in proportion, the same for the same seed, honest about what is missing."""

import json
from collections import Counter

import pytest
from json_lines import lines, write

from data_tools.sample import allocate, label_class, main, sample_file
from dreamprm_dist.errors import InputError


def record(i, labels, dataset="a", **fields):
    turns = [{"from": "human", "value": "Q"}]
    turns += [{"from": "gpt", "value": label} for label in labels]
    return {"id": i, "dataset": dataset, "conversations": turns, **fields}


@pytest.fixture
def source(tmp_path):
    """300 records of a, 100 of b (a quarter of each ends in -), 40 of c, all of them +."""
    records = [record(i, "+-" if i % 4 == 0 else "-+", "a") for i in range(300)]
    records += [record(300 + i, "+-" if i % 4 == 0 else "++", "b") for i in range(100)]
    records += [record(400 + i, "++", "c") for i in range(40)]
    return write(tmp_path / "train.jsonl", records)


def count(path):
    return Counter((r["dataset"], r["conversations"][-1]["value"]) for r in lines(path))


def test_halves_in_proportion_to_the_data_sets(source, tmp_path):
    out = tmp_path / "out.jsonl"
    drawn = sample_file(source, out, 88).drawn
    # 44 of each class over 300 : 100 : 40; c has no negative, so its 4 go to a and b, 3 : 1.
    assert count(out) == {
        ("a", "+"): 30,
        ("b", "+"): 10,
        ("c", "+"): 4,
        ("a", "-"): 33,
        ("b", "-"): 11,
    }
    assert drawn == {"a": {"+": 30, "-": 33}, "b": {"+": 10, "-": 11}, "c": {"+": 4}}
    ids = [r["id"] for r in lines(out)]
    assert ids == sorted(set(ids))


def test_the_seed_decides_and_a_larger_sample_holds_the_smaller(source, tmp_path):
    def ids(name, n, seed):
        sample_file(source, tmp_path / name, n, seed=seed)
        return {r["id"] for r in lines(tmp_path / name)}

    first = ids("a.jsonl", 88, 1)
    assert ids("b.jsonl", 88, 1) == first
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert len(ids("c.jsonl", 88, 2) & first) < 60
    assert ids("d.jsonl", 176, 1) > first


def test_balance_by_steps_and_without_balance(source, tmp_path):
    sample_file(source, tmp_path / "steps.jsonl", 101, balance="steps")
    negative = sum("-" in json.dumps(r["conversations"]) for r in lines(tmp_path / "steps.jsonl"))
    assert negative == 50  # the odd one is positive
    drawn = sample_file(source, tmp_path / "none.jsonl", 440, balance="none").drawn
    assert {name: sum(counts.values()) for name, counts in drawn.items()} == {
        "a": 300,
        "b": 100,
        "c": 40,
    }


@pytest.mark.parametrize(
    ("labels", "fields", "final", "steps"),
    [
        ("+-", {}, "-", "-"),
        ("-+", {}, "+", "-"),
        ("++", {}, "+", "+"),
        (["+", None], {}, None, "+"),
        (["+", "-", None, None], {}, "-", "-"),
        ([None, "-", None], {}, "-", "-"),
        (["-", None], {}, "-", "-"),
        (["-", None, "+"], {}, "+", "-"),
        (["+", None, "-", None], {"true_false": True}, "+", "-"),
        ([None, None, "+"], {}, "+", "+"),
        ([None], {}, None, None),
        ("++", {"true_false": False}, "-", "+"),
    ],
)
def test_label_classes(labels, fields, final, steps):
    assert label_class(record(0, labels, **fields), "final") == final
    assert label_class(record(0, labels, **fields), "steps") == steps


def test_allocate_is_exact_and_never_above_what_there_is():
    assert allocate(7, {"a": 1, "b": 1}, {"a": 9, "b": 9}) == {"a": 4, "b": 3}
    assert allocate(10, {"a": 90, "b": 5, "c": 5}, {"a": 3, "b": 5, "c": 5}) == {
        "a": 3,
        "b": 4,
        "c": 3,
    }
    big = 10**17 + 1  # floats would lose the 1
    assert sum(allocate(big, {"a": 3, "b": 7}, {"a": big, "b": big}).values()) == big


def test_what_cannot_be_balanced_is_listed(tmp_path):
    records = [record(0, "+"), record(1, "-"), record(2, [None]), {"id": 3}, record(4, "+", 5)]
    source = write(tmp_path / "in.jsonl", records)
    with source.open("ab") as file:
        file.write(b"garbage\n")
    sample_file(source, tmp_path / "out.jsonl", 2)
    assert [r["id"] for r in lines(tmp_path / "out.jsonl")] == [0, 1]
    assert [r["line"] for r in lines(tmp_path / "out.rejected.jsonl")] == [3, 4, 5, 6]


def test_wrong_solutions_that_end_unvisited_are_the_negative_half(tmp_path, capsys):
    """As VisualPRM's are: nothing was rolled out after the first wrong step."""
    wrong = [["-", None], ["+", "-", None], ["+", "+", "-", None, None], ["-", None, None], "+-"]
    other = ["+", "++", "+++", "++++", "+++++", [None], [None, None], ["+", None]]
    records = [record(-1, labels, "a") for labels in [*wrong, *other]]
    source = write(tmp_path / "in.jsonl", [*records, record(-1, "+", "b"), {"id": 3}])
    out = tmp_path / "out.jsonl"
    main([str(source), "--n", "10", "--out", str(out)])
    drawn = lines(out)
    assert sum("-" in json.dumps([t["value"] for t in r["conversations"]]) for r in drawn) == 5
    assert {f"in.jsonl:{line}" for line in range(1, 6)} < {r["id"] for r in drawn}
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("a: ") and printed[0].endswith("of 5 +, 5 of 5 -")
    assert printed[1].endswith("of 1 +")
    assert printed[2:] == [
        "2 left out: no step has a label to balance by.",
        "1 left out: every label is + and the last step has none; --balance steps takes it as +.",
        "1 left out: cannot be read.",
        f"{out}: 10 records, 4 left out (see {tmp_path / 'out.rejected.jsonl'})",
    ]
    rejected = lines(tmp_path / "out.rejected.jsonl")
    assert [r["id"] for r in rejected] == [*(f"in.jsonl:{line}" for line in (11, 12, 13)), 3]


def test_meta_records_keep_their_missing_ids(tmp_path):
    records = [record(-1, [None], true_false=right) for right in (True, False)]
    sample_file(write(tmp_path / "in.jsonl", records), tmp_path / "out.jsonl", 2)
    assert lines(tmp_path / "out.jsonl") == records


def test_image_paths_follow_the_sample_to_its_folder(tmp_path):
    records = [record(0, "+", image="a/x.png"), record(1, "-", image=["/y.png", "z.png"])]
    source = write(tmp_path / "in.jsonl", records)
    sample_file(source, tmp_path / "sub" / "out.jsonl", 2)
    images = [r["image"] for r in lines(tmp_path / "sub" / "out.jsonl")]
    assert images == ["../a/x.png", ["/y.png", "../z.png"]]


def test_bad_requests_leave_no_file(source, tmp_path):
    out = str(tmp_path / "out.jsonl")
    for arguments, message in (
        (["--n", "300"], "150 records of class - are wanted and there are 100"),
        (["--n", "0"], "1 record or more"),
    ):
        with pytest.raises(InputError, match=f"{message}"):
            main([str(source), "--out", out, *arguments])
    with pytest.raises(InputError, match="overwrite the input"):
        main([str(source), "--out", str(source), "--n", "2", "--overwrite"])
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]
