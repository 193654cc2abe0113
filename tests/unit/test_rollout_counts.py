"""The roll-outs from a step stay with it on the way from a downloaded file into the shards."""

import copy
import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from data_tools.convert import convert_raw
from data_tools.convert import main as convert
from data_tools.decontaminate import main as decontaminate
from data_tools.sample import main as sample
from data_tools.shard import main as shard
from data_tools.shard import shard_file
from dreamprm_dist.data.schema import parse_training_record, step_counts, step_labels
from dreamprm_dist.data.shards import MANIFEST, ShardFolder
from dreamprm_dist.errors import RecordError

Counts = tuple[object, object]
UNKNOWN = (0, 0)


def gpt(label: str | None, correct: object = None, total: object = None) -> dict:
    counts = {"num_mc_correct": correct, "num_mc_total": total}
    return {"from": "gpt", "value": label} | {k: v for k, v in counts.items() if v is not None}


def record(*steps: dict, **fields: object) -> dict:
    human = {"from": "human", "value": "Q"}
    return {
        "id": "r",
        "conversations": [turn for step in steps for turn in (human, step)],
        **fields,
    }


def raw(*steps: dict, **fields: object) -> dict:
    steps = tuple({"step": "s", **step} for step in steps)
    return {"question": "Q?", "steps_with_score": steps and list(steps), **fields}


def counted(correct: object, total: object, **fields: object) -> dict:
    return {"num_mc_correct": correct, "num_mc_total": total, **fields}


def write(path: Path, records: Iterable[dict]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def test_a_step_may_say_its_roll_outs():
    turns = [gpt("+", 3, 16), gpt("-"), gpt(None, 0, 0), gpt(None, 2, 4), gpt(" + ", 4, 4)]
    turns[0]["more"] = 1
    parsed = parse_training_record(record(*turns)).conversations
    del turns[0]["more"]
    turns[4]["value"] = "+"
    assert parsed[1::2] == turns
    assert step_counts(parsed) == [(3, 16), UNKNOWN, UNKNOWN, (2, 4), (4, 4)]


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (gpt("+", 3), "give both"),
        (gpt("+", None, 3), "give both"),
        (gpt("+", 4, 3), "the first from 0 to the second, not 4 and 3"),
        (gpt("+", -1, 3), "not -1 and 3"),
        (gpt("+", 1.0, 3), "whole numbers"),
        (gpt("+", 1, "3"), "whole numbers"),
        (gpt("+", True, 3), "whole numbers"),
        (gpt("+", 1, True), "whole numbers"),
        (gpt("+", 1, 2**31), "whole numbers"),
        (gpt(None, 1, 0), "not 1 and 0"),
        (gpt("+", 0, 0), r"'num_mc_total' is 0\), so its label must be null, not '\+'"),
        (gpt("-", 0, 0), "must be null, not '-'"),
    ],
)
def test_impossible_roll_outs_are_refused(turn: dict, message: str):
    with pytest.raises(RecordError, match=rf"^conversations\[3\]: .*{message}"):
        parse_training_record(record(gpt("+"), turn))


@pytest.mark.parametrize(
    ("step", "label", "counts"),
    [
        (counted(3, 16, score=0.1875), "+", (3, 16)),
        (counted(3, 16, score=0.19), "+", (3, 16)),  # two decimals
        (counted(3.0, 16.0, score=0.1875), "+", (3, 16)),
        (counted(3, 16), "+", (3, 16)),  # they say the score
        (counted(0, 16, score=0), "-", (0, 16)),
        (counted(0, 16, score=None), "-", (0, 16)),
        (counted(0, 0, score=0.0), None, UNKNOWN),
        ({"score": 0.5}, "+", UNKNOWN),
        ({"score": 0.0, "num_mc_total": 16}, "-", UNKNOWN),
        ({"score": 0.0, "num_mc_total": 0}, None, UNKNOWN),
    ],
)
def test_raw_steps_keep_their_roll_outs(step: dict, label: str | None, counts: Counts):
    turns = convert_raw(raw(counted(1, 2, score=0.5), step))["conversations"]
    assert (step_labels(turns), step_counts(turns)) == (["+", label], [(1, 2), counts])
    assert ("num_mc_total" in turns[-1]) == ("num_mc_correct" in step)
    above = convert_raw(raw(step), threshold=0.9)["conversations"]
    assert (step_labels(above), step_counts(above)) == ([label and "-"], [counts])


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (counted(17, 16, score=1.0), "not 17 and 16"),
        (counted(0.5, 16, score=0.0), "not 0.5 and 16"),
        (counted(3, 0, score=0.0), "not 3 and 0"),
        (counted(3, 16, score=0.5), "'score' 0.5 is not the 3 of 16 roll-outs"),
        (counted(3, 16, score=0.2), "'score' 0.2"),
        (counted(3, 16, score=True), "'score' must be a finite number|'score' True"),
        ({"num_mc_correct": 3}, "'score' must be a finite number"),
    ],
)
def test_a_raw_record_that_contradicts_itself_is_rejected_by_line(
    tmp_path: Path, step: dict, message: str
):
    source = write(tmp_path / "a.jsonl", [raw(counted(1, 2)), raw(counted(1, 2), step)])
    convert(["raw", str(source), "--out", str(tmp_path / "out.jsonl")])
    (rejected,) = map(json.loads, (tmp_path / "out.rejected.jsonl").read_text().splitlines())
    assert rejected["line"] == 2
    with pytest.raises(RecordError, match=message):
        raise RecordError(rejected["reason"])
    assert rejected["reason"].startswith("steps_with_score[1]: ")


def test_every_command_hands_roll_outs_on_to_the_shards(tmp_path: Path, capsys):
    steps = [counted(3, 16), counted(0, 16), counted(0, 0), {"score": 1.0}]
    source = write(tmp_path / "a.jsonl", [raw(*steps, question=f"What is {i}?") for i in range(6)])
    wanted = [gpt("+", 3, 16), gpt("-", 0, 16), gpt(None, 0, 0), gpt("+")]
    against = write(tmp_path / "test.jsonl", [{"question": "Something else?"}])
    names = [str(tmp_path / f"{i}.jsonl") for i in range(4)]
    convert(["raw", str(source), "--out", names[0]])
    convert(["conversations", names[0], "--out", names[1]])
    decontaminate([names[1], "--against", str(against), "--out", names[2]])
    sample([names[2], "--n", "4", "--balance", "none", "--out", names[3]])
    for name in names:
        for line in Path(name).read_text().splitlines():
            assert json.loads(line)["conversations"][2::2] == wanted
    capsys.readouterr()
    shard(["--train", names[3], "--out", str(tmp_path / "shards"), "--num_shards", "2"])
    assert "steps:     8 +, 4 -, 4 unlabelled; 8 with roll-outs\n" in capsys.readouterr().out
    folder = ShardFolder(tmp_path / "shards" / "train")
    assert folder.read(1, 1)["conversations"][2::2] == wanted
    assert step_counts(folder.read_column(0, "conversations")[0]) == [
        (3, 16),
        (0, 16),
        (0, 0),
        (0, 0),
    ]
    assert (folder.manifest["format_version"], folder.manifest["num_counted_steps"]) == (2, 8)


def test_shards_without_roll_outs_and_of_the_first_version_are_read(tmp_path: Path):
    source = write(tmp_path / "a.jsonl", [record(gpt("+"), gpt("-")), record(gpt("+", 5, 4))])
    manifest = shard_file(source, tmp_path / "out", "training", 1)
    assert (manifest["num_counted_steps"], manifest["num_rejected"]) == (0, 1)
    assert manifest["num_steps"] == {"+": 1, "-": 1, "unlabelled": 0}
    first = copy.deepcopy(manifest) | {"format_version": 1}
    del first["num_counted_steps"]
    (tmp_path / "out" / MANIFEST).write_text(json.dumps(first))
    folder = ShardFolder(tmp_path / "out")
    assert step_counts(folder.read(0, 0)["conversations"]) == [UNKNOWN, UNKNOWN]
