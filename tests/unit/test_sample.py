"""Samples: balanced, in proportion, the same for the same seed, honest about what is missing."""

import json
import math
from collections import Counter
from fractions import Fraction

import pandas as pd
import pytest
from json_lines import lines, write

from data_tools.ranking import bis, mc_agreement, mc_counts
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


def rolled_out(i, *counts, dataset="a", **fields):
    """A record of steps with (right roll-outs, roll-outs) each, or None without counts."""
    made = record(i, "+" * len(counts), dataset, **fields)
    for turn, pair in zip(made["conversations"][1:], counts, strict=True):
        if pair is not None:
            turn |= {"num_mc_correct": pair[0], "num_mc_total": pair[1]}
    return made


@pytest.mark.parametrize(
    ("counts", "score", "agreement"),
    [
        # p = 2/3 and R = (1 + 1/2) / 2: (2/9 + 1/20) * 3/4.
        ([(4, 4), (2, 4), (0, 4)], Fraction(49, 240), Fraction(2, 3)),
        ([(4, 4), (0, 4)], Fraction(3, 10), 1),
        ([(1, 4), (0, 4)], Fraction(3, 40), Fraction(3, 4)),
        ([(3, 4), (1, 4)], Fraction(1, 40), Fraction(1, 2)),
        ([(4, 4), (4, 4)], Fraction(1, 20), 1),
        ([(0, 4), (0, 8)], Fraction(1, 20), 1),
        ([(2, 4)], Fraction(1, 40), 0),
    ],
)
def test_scores_by_roll_outs_are_the_closed_forms(counts, score, agreement):
    turns = rolled_out(0, None, (0, 0), *counts, None)["conversations"]
    assert mc_counts(turns) == counts  # a step that no roll-out visited counts for nothing
    assert (bis(counts), mc_agreement(counts)) == (score, agreement)


def test_the_best_of_each_data_set_are_taken_in_the_order_of_the_file(tmp_path, capsys):
    """Six of a and three of b; BIS is best with a right and a wrong step, then with none right."""
    a = [[(4, 4)], [(2, 4)], [(4, 4), (0, 4)], [(1, 4), (0, 4)], [(0, 4)], [(3, 4), (0, 4)]]
    b = [[(1, 4)], [(4, 4)], [(3, 4)]]
    records = [rolled_out(i, *counts) for i, counts in enumerate(a)]
    records[1:1] = [rolled_out(10 + i, *counts, dataset="b") for i, counts in enumerate(b)]
    source = write(tmp_path / "in.jsonl", records)
    main([str(source), "--n", "5", "--rank_by", "bis", "--out", str(tmp_path / "out.jsonl")])
    # 5 over 6 : 3 are 3 of a and 2 of b.
    assert [r["id"] for r in lines(tmp_path / "out.jsonl")] == [11, 12, 2, 3, 5]
    assert capsys.readouterr().out.splitlines()[:2] == ["a: 3 of 6", "b: 2 of 3"]
    main([str(source), "--n", "3", "--rank_by", "mc_agreement", "--out", str(tmp_path / "m.jsonl")])
    drawn = [r["id"] for r in lines(tmp_path / "m.jsonl")]
    assert drawn[0] in (0, 11) and {11} < {*drawn} <= {0, 11, 2, 4}  # 2 of a's 3 that agree wholly


def test_a_data_set_with_less_to_rank_than_its_share_gives_what_it_has(tmp_path):
    """Its share is that of all of its records; what it lacks goes to the others."""
    records = [rolled_out(i, (1, 4), (0, 4)) for i in range(6)]
    records += [rolled_out(10 + i, None, (0, 0), dataset="b") for i in range(5)]
    records += [rolled_out(20, (4, 4), dataset="b"), {"id": 30, "conversations": 5}]
    records += [rolled_out(31, (5, 4)), rolled_out(32, (1.5, 4)), rolled_out(33, (True, 4))]
    source = write(tmp_path / "in.jsonl", records)
    sample = sample_file(source, tmp_path / "out.jsonl", 4, rank_by="bis")
    assert sample.drawn == {"a": {"": 3}, "b": {"": 1}}
    rejected = {r["id"]: r["reason"] for r in lines(tmp_path / "out.rejected.jsonl")}
    assert rejected.keys() == {*range(10, 15), 30, 31, 32, 33}
    assert {rejected[i] for i in range(10, 15)} == {"no step has roll-out counts to rank by."}
    assert "no list of turns" in rejected[30]
    assert rejected[31].startswith("step 1 has num_mc_correct 5 of num_mc_total 4; give whole")
    assert "5 left out: no step has roll-out counts to rank by." in sample.summary().splitlines()
    with pytest.raises(InputError, match="8 records are wanted and 7 can be ranked; lower --n"):
        sample_file(source, tmp_path / "more.jsonl", 8, rank_by="bis")


def test_among_equals_the_seed_chooses(tmp_path):
    """Of equal scores, also where floats would differ: a mean of 1, .8 and .6 is .8."""
    records = [rolled_out(i, (1, 10)) for i in range(5)]
    records += [rolled_out(5 + i, (0, 10), (1, 10), (2, 10)) for i in range(5)]
    records += [rolled_out(10, (10, 10)), rolled_out(11, (5, 10))]
    source = write(tmp_path / "in.jsonl", records)
    assert sum(abs(2 * k / 10 - 1) for k in range(3)) / 3 < abs(2 * 1 / 10 - 1)

    def drawn(n: int, seed: int) -> list[int]:
        out = tmp_path / "out.jsonl"
        sample_file(source, out, n, seed=seed, rank_by="mc_agreement", overwrite=True)
        return [r["id"] for r in lines(out)]

    draws = [drawn(6, seed) for seed in range(20)]
    assert draws == [drawn(6, seed) for seed in range(20)]
    assert all(10 in ids and 11 not in ids for ids in draws)
    counts = Counter(i for ids in draws for i in ids)
    assert all(0 < counts[i] < 20 for i in range(10)) and len({*map(tuple, draws)}) > 10
    assert {*drawn(3, 1)} < {*drawn(6, 1)}


def losses_at(path, losses, **columns):
    table = {"source_id": [*losses], "loss": [*losses.values()]} | columns
    pd.DataFrame({k: v for k, v in table.items() if v is not None}).to_parquet(path)
    return path


def test_the_smallest_losses_are_taken(tmp_path):
    """By the record's id, or by where it stands; what was not measured is left out."""
    ids = ["x", 7, -1, None, "unlabelled", "broken", "new"]
    records = [record(i, "+") for i in ids]
    source = write(tmp_path / "in.jsonl", records)
    losses = {"x": 0.5, "7": 0.1, "in.jsonl:3": 0.75, "in.jsonl:4": 0.25, "other": 0.0}
    losses |= {"unlabelled": None, "broken": math.inf}
    file = losses_at(tmp_path / "losses.parquet", losses)
    best = ["7", "in.jsonl:4", "x", "in.jsonl:3"]
    for n in range(1, 5):
        out = tmp_path / f"{n}.jsonl"
        flags = ["--rank_by", "small_loss", "--instance_losses", str(file), "--out", str(out)]
        main([str(source), "--n", str(n), *flags])
        assert {str(r["id"]) for r in lines(out)} == {*best[:n]}
    rejected = {r["id"]: r["reason"] for r in lines(out.with_suffix(".rejected.jsonl"))}
    missing = "the instance losses have no number for its id."
    assert rejected == dict.fromkeys(["unlabelled", "broken", "new"], missing)


def test_rankings_that_cannot_be_are_refused(source, tmp_path):
    file = str(losses_at(tmp_path / "losses.parquet", {"a": 0.5}))
    twice = str(losses_at(tmp_path / "twice.parquet", {"a": 0.5, "b": 0.5}, source_id=["a", "a"]))
    nameless = str(losses_at(tmp_path / "no.parquet", {"a": 0.5}, source_id=None, sample_id=[0]))
    small = ["--rank_by", "small_loss", "--instance_losses"]
    for arguments, message in (
        (["--rank_by", "bis", "--balance", "none"], "leave --balance out"),
        (["--rank_by", "small_loss"], "small_loss needs --instance_losses"),
        (["--rank_by", "bis", "--instance_losses", file], "small_loss, not for bis; leave it out"),
        (["--instance_losses", file], "is for --rank_by small_loss; leave it out"),
        ([*small, twice], "source_id 'a' has several losses"),
        ([*small, nameless], "has no source_id"),
        ([*small, str(tmp_path / "none.parquet")], "no such file; give a Parquet file"),
        (["--rank_by", "bis"], "2 records are wanted and 0 can be ranked"),
    ):
        with pytest.raises(InputError, match=message):
            main([str(source), "--n", "2", "--out", str(tmp_path / "out.jsonl"), *arguments])
    assert not (tmp_path / "out.jsonl").exists()
