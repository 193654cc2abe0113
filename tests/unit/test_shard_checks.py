"""What sharding finds out before it writes: labels, kinds of files, numbers of shards."""

import json
import logging
import lzma
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_tools.shard import cached_shards, main, shard_file
from dreamprm_dist.data.shards import MANIFEST, REJECTED, ShardFolder
from dreamprm_dist.errors import InputError

REPO = Path(__file__).resolve().parents[2]


def record(i: int, labels: str = "+", **fields: object) -> dict:
    turns: list[dict] = [{"from": "human", "value": f"Question {i}"}]
    for label in labels:
        turns.append({"from": "gpt", "value": None if label == "0" else label})
    return {"id": f"id{i}", "conversations": turns, **fields}


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def training(path: Path, count: int = 40) -> Path:
    return write(path, [record(i, "+-") for i in range(count)])


def meta(path: Path, questions: int, **fields: object) -> Path:
    records = [
        record(i, "0", **{"id": f"q{i % questions}", "true_false": i % 3 == 0, "response": "r"})
        for i in range(2 * questions)
    ]
    return write(path, [r | fields for r in records])


def sharded(folder: Path, *arguments: object) -> None:
    main([*map(str, arguments), "--out", str(folder / "out")])


# Labels


@pytest.mark.parametrize(
    ("labels", "steps", "unlabelled"),
    [
        (["+-", "+"], (2, 1, 0), 0),
        (["+-", "0"], (1, 1, 1), 1),
        (["-0+", "00", "0", "++"], (3, 1, 4), 2),
        (["0-", "0+", "000"], (1, 1, 5), 1),
        (["+", "-", "0", "0", "0"], (1, 1, 3), 3),
    ],
)
def test_labels_are_counted_and_records_without_any_are_warned_of(
    tmp_path: Path, caplog, capsys, labels: list[str], steps: tuple, unlabelled: int
):
    source = write(tmp_path / "a.jsonl", [record(i, text) for i, text in enumerate(labels)])
    sharded(tmp_path, "--train", source, "--num_shards", 1)
    manifest = json.loads((tmp_path / "out" / "train" / MANIFEST).read_text())
    assert manifest["num_steps"] == dict(zip(("+", "-", "unlabelled"), steps, strict=True))
    assert manifest["num_unlabelled"] == unlabelled
    printed = capsys.readouterr().out
    assert "steps:     {} +, {} -, {} unlabelled".format(*steps) in printed
    assert (f"; {unlabelled} records without any label" in printed) == (unlabelled > 0)
    warned = f"{unlabelled} of {len(labels)} records have no labelled step"
    assert (warned in caplog.text) == (unlabelled > 0)


@pytest.mark.parametrize("labels", [["0"], ["000", "0"], ["00"] * 300])
@pytest.mark.parametrize("call", ["command", "cache", "dry run"])
def test_a_training_set_without_labels_is_refused(tmp_path: Path, labels: list[str], call: str):
    source = write(tmp_path / "a.jsonl", [record(i, text) for i, text in enumerate(labels)])
    with pytest.raises(InputError, match=rf"a\.jsonl: no step of its {len(labels)} records is"):
        if call == "cache":
            cached_shards(source, "training", 1)
        else:
            dry = ["--dry_run"] if call == "dry run" else []
            sharded(tmp_path, "--train", source, "--num_shards", 1, *dry)
    assert not list(tmp_path.rglob(MANIFEST)) and not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize(
    ("kind", "records", "warning"),
    [
        ("training", [record(0, "+"), record(1, "+0+")], "every labelled step is +;"),
        ("training", [record(0, "--"), record(1, "0")], "every labelled step is -;"),
        ("training", [record(0, "-"), record(1, "+")], None),
        ("meta", [record(i, "0", true_false=True) for i in (0, 1)], "all 2 solutions are right"),
        ("meta", [record(0, "+-", true_false=False)], "all 1 solutions are wrong"),
        ("meta", [record(i, "0", true_false=i == 1) for i in (0, 1)], None),
    ],
)
def test_one_answer_alone_is_warned_of(
    tmp_path: Path, caplog, kind: str, records: list[dict], warning: str | None
):
    shard_file(write(tmp_path / "a.jsonl", records), tmp_path / "out", kind, 1)
    one_sided = [
        r.message for r in caplog.records if "every labelled" in r.message or "all" in r.message
    ]
    assert bool(one_sided) == (warning is not None)
    assert warning is None or warning in one_sided[0]


# Names


@pytest.mark.parametrize("kind", ["training", "meta"])
@pytest.mark.parametrize("form", ["lines", "list"])
def test_records_without_an_id_are_named_by_file_and_line(tmp_path: Path, kind: str, form: str):
    ids = ["a", -1, None, "", "-1", 0]
    records = [record(i, "+-", true_false=i < 3) | {"id": given} for i, given in enumerate(ids)]
    del records[2]["id"]
    bad = [{"id": -1}, {"id": "b"}, {}, {"id": 7}]
    source = write(tmp_path / "some.jsonl", records + bad)
    if form == "list":
        source.write_text(json.dumps(records + bad))
    shard_file(source, tmp_path / "out", kind, 1)
    folder = ShardFolder(tmp_path / "out")
    names = dict(zip(*(folder.read_column(0, c) for c in ("sample_id", "source_id")), strict=True))
    named = [f"some.jsonl:{line}" for line in (2, 3, 4, 5)]
    assert [names[i] for i in range(6)] == ["a", *named, "0"]
    rejected = map(json.loads, (tmp_path / "out" / REJECTED).read_text().splitlines())
    assert [entry["id"] for entry in rejected] == ["some.jsonl:7", "b", "some.jsonl:9", 7]
    if kind == "meta":  # of one question each, for the names do not make the groups
        assert folder.num_groups == 6


def test_names_do_not_part_the_solutions_of_a_question(tmp_path: Path):
    records = [record(7, "0", true_false=i > 1) | {"id": -1} for i in range(4)]
    assert (
        shard_file(write(tmp_path / "m.jsonl", records), tmp_path / "o", "meta", 1)["num_groups"]
        == 1
    )


# Other files


QUESTION = {"id": "q", "question": "Q?", "options": ["1", "2"], "answer": "A", "image_path": None}
STEP = {"step": "One.", "score": 0.5, "num_mc_correct": 1, "num_mc_total": 2}
OTHERS = {
    "raw": ({"image": "a.png", "question": "Q?", "steps_with_score": [STEP]}, "convert raw"),
    "raw with response": (
        {"question": "Q?", "response": "r", "steps_with_score": []},
        "convert raw",
    ),
    "test": (QUESTION | {"candidates": ["1"], "true_false": [True]}, "launch/evaluate.py"),
    "questions": (QUESTION, "data_tools.generate"),
    "open question": ({"question": "Q?", "answer": "4"}, "convert candidates"),
    "candidates": ({"id": "q", "response": "Answer: 1", "sample": 0}, "convert candidates"),
    "solutions": ({"question": "Q?", "steps": ["One."]}, "launch/score.py"),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("flag", ["--train", "--meta"])
@pytest.mark.parametrize("form", ["lines", "list"])
def test_records_of_another_kind_name_the_command_that_converts_them(
    tmp_path: Path, name: str, flag: str, form: str
):
    other, command = OTHERS[name]
    source = write(tmp_path / "b.jsonl", [other] * 3)
    if form == "list":
        source.write_text(json.dumps([other] * 3))
    good = training(tmp_path / "t.jsonl"), meta(tmp_path / "m.jsonl", 8)
    both = ["--train", good[0], "--meta", good[1], flag, source]
    with pytest.raises(InputError, match=rf"b\.jsonl: holds no .*{command}"):
        sharded(tmp_path, *both)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.parquet", r"is a Parquet file; convert it first: .* mmmu"),
        ("parquet named.jsonl", "is a Parquet file; convert it first"),
        ("folder", "is a folder of Parquet or Arrow; convert it first"),
        ("saved", "is a folder of Parquet or Arrow; convert it first"),
        ("saved/data.arrow", "is an Arrow file; convert it first"),
        ("out.jsonl.gz", "is a gzip file; unpack it first"),
        ("out.zip", "is a ZIP archive; unpack it first"),
        ("a.png", "is PNG; give a JSON list"),
        ("pointer.jsonl", "is a Git LFS pointer .*git lfs pull"),
        ("page.jsonl", "is an HTML page; give"),
        ("out.xz", "is an xz file; give a JSON list"),
        ("out.zst", "is a Zstandard file; give"),
        ("wide.json", "is a text in UTF-16; give"),
        ("done/train", r"is a shard folder already; give it to launch/train\.py"),
    ],
)
def test_what_is_no_json_is_told_by_what_it_is(tmp_path: Path, name: str, message: str):
    table = pa.table({"id": ["a"]})
    for folder in ("folder/deep", "saved"):
        (tmp_path / folder).mkdir(parents=True)
    for path in ("a.parquet", "parquet named.jsonl", "folder/deep/test-0.parquet"):
        pq.write_table(table, tmp_path / path)
    with pa.ipc.new_file(str(tmp_path / "saved" / "data.arrow"), table.schema) as writer:
        writer.write_table(table)
    source = training(tmp_path / "t.jsonl")
    shutil.make_archive(str(tmp_path / "out"), "zip", tmp_path, source.name)
    subprocess.run(["gzip", "--keep", source], check=True)
    source.with_suffix(".jsonl.gz").rename(tmp_path / "out.jsonl.gz")
    Image.new("L", (2, 2)).save(tmp_path / "a.png")
    (tmp_path / "pointer.jsonl").write_text("version https://git-lfs.github.com/spec/v1\noid 1\n")
    (tmp_path / "page.jsonl").write_text("<!DOCTYPE html><html>Not found</html>")
    (tmp_path / "out.xz").write_bytes(lzma.compress(source.read_bytes()))
    (tmp_path / "out.zst").write_bytes(b"\x28\xb5\x2f\xfd\x24")
    (tmp_path / "wide.json").write_text(source.read_text(), encoding="utf-16")
    main(["--train", str(source), "--out", str(tmp_path / "done")])
    with pytest.raises(InputError, match=message):
        sharded(tmp_path, "--train", tmp_path / name)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_no_file(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="is a folder, not a file"):
        sharded(tmp_path, "--train", tmp_path)


def test_odd_records_among_the_first_do_not_make_a_file_another_kind(tmp_path: Path):
    good = [record(i, "+-", true_false=True) for i in range(3)]
    source = write(tmp_path / "a.jsonl", [QUESTION, {"response": "r"}, *good])
    for kind in ("training", "meta"):
        assert shard_file(source, tmp_path / kind, kind, 1)["num_rejected"] == 2


@pytest.mark.parametrize("form", ["lines", "list"])
@pytest.mark.parametrize("count", [1, 19, 300])
def test_train_and_meta_swapped_are_noticed(tmp_path: Path, form: str, count: int):
    train, held_out = training(tmp_path / "t.jsonl", count), meta(tmp_path / "m.jsonl", 8)
    if form == "list":
        train.write_text(json.dumps([json.loads(line) for line in train.open()]))
    with pytest.raises(InputError, match=r"t\.jsonl: holds training .* --train and --meta swapped"):
        sharded(tmp_path, "--train", held_out, "--meta", train)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["m.jsonl", "./m.jsonl", "link.jsonl", "hard.jsonl", "sub/../m.jsonl"]
)
def test_one_file_is_not_both(tmp_path: Path, name: str):
    source = meta(tmp_path / "m.jsonl", 8)
    (tmp_path / "sub").mkdir()
    (tmp_path / "link.jsonl").symlink_to(source)
    (tmp_path / "hard.jsonl").hardlink_to(source)
    with pytest.raises(InputError, match="--train and --meta are one file"):
        sharded(tmp_path, "--train", source, "--meta", f"{tmp_path}/{name}")


# Numbers


@pytest.mark.parametrize(
    ("questions", "num_shards", "fits"),
    [
        (55, 64, 32),
        (64, 64, 64),
        (63, 64, 32),
        (5, 8, 4),
        (7, 12, 6),
        (5, 12, 4),
        (1, 8, 1),
        (3, 7, 1),
    ],
)
def test_a_small_meta_set_gets_the_most_shards_that_fit(
    tmp_path: Path, capsys, caplog, questions: int, num_shards: int, fits: int
):
    train, held_out = training(tmp_path / "t.jsonl", 64), meta(tmp_path / "m.jsonl", questions)
    caplog.set_level(logging.INFO)
    sharded(tmp_path, "--train", train, "--meta", held_out, "--num_shards", num_shards)
    assert ShardFolder(tmp_path / "out" / "train").num_shards == num_shards
    folder = ShardFolder(tmp_path / "out" / "meta")
    assert (folder.num_shards, folder.num_groups) == (fits, questions)
    shown = f"{questions} questions cannot fill {num_shards} shards; it gets {fits}"
    assert (shown in caplog.text) == (fits < num_shards)
    assert ("can train on both" in capsys.readouterr().out) == (fits < num_shards)


def test_a_raw_meta_file_gets_as_many_shards_as_it_fills(tmp_path: Path):
    assert ShardFolder(cached_shards(meta(tmp_path / "m.jsonl", 5), "meta", 8)).num_shards == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--meta_num_shards", "56"],
            r"55 questions cannot fill 56 shards; use at most 55 .* as 28",
        ),
        (["--num_shards", "41"], r"40 accepted records cannot fill 41 shards; use at most 40"),
        (["--num_shards", "41", "--limit", "7"], "7 accepted records cannot fill 41 shards"),
        (["--meta_num_shards", "0"], "number of shards must be 1 or more, not 0"),
    ],
)
def test_numbers_that_cannot_be_are_refused_before_anything_is_written(
    tmp_path: Path, arguments: list[str], message: str
):
    train, held_out = training(tmp_path / "t.jsonl"), meta(tmp_path / "m.jsonl", 55)
    with pytest.raises(InputError, match=message):
        sharded(tmp_path, "--train", train, "--meta", held_out, *arguments)
    assert not list(tmp_path.glob("out/*"))


def test_a_meta_set_that_is_wrong_is_known_before_training_records_are_looked_at(tmp_path: Path):
    train = training(tmp_path / "t.jsonl")
    held_out = write(tmp_path / "m.jsonl", [{"conversations": [], "true_false": True}])
    killed = tmp_path / "out" / "train.partial" / "blocks"
    killed.mkdir(parents=True)
    with pytest.raises(InputError, match="all 1 records were rejected"):
        sharded(tmp_path, "--train", train, "--meta", held_out)
    assert killed.is_dir() and not (tmp_path / "out" / "meta.partial").exists()


@pytest.mark.parametrize("limit", [1, 7, 256, 300, 1000])
@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_records_alone(tmp_path: Path, limit: int, workers: int):
    train = training(tmp_path / "t.jsonl", 600)
    train.write_text("\n" + train.read_text())
    sharded(tmp_path, "--train", train, "--num_shards", 1, "--limit", limit, "--workers", workers)
    folder = ShardFolder(tmp_path / "out" / "train")
    assert folder.num_rows == min(limit, 600) and folder.manifest["limit"] == limit
    assert folder.read(0, folder.num_rows - 1)["source_id"] == f"id{folder.num_rows - 1}"


def test_another_limit_is_another_job(tmp_path: Path, monkeypatch):
    train = training(tmp_path / "t.jsonl", 20)

    def full(self, *_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr("data_tools.sharding.Checked.write", full)
        sharded(tmp_path, "--train", train, "--limit", 8)
    sharded(tmp_path, "--train", train)
    assert ShardFolder(tmp_path / "out" / "train").num_rows == 20


def test_a_dry_run_says_everything_and_writes_nothing(tmp_path: Path, capsys):
    held_out = meta(tmp_path / "m.jsonl", 55)
    lines = training(tmp_path / "t.jsonl").read_text()
    train = tmp_path / "t.jsonl"
    train.write_text(lines + '{"id": "bad"}\n{\n' + json.dumps(record(7, "0")) + "\n")
    arguments = ["--train", train, "--meta", held_out, "--num_shards", 16]
    before = sorted(tmp_path.rglob("*"))
    for workers in (1, 2):
        sharded(tmp_path, *arguments, "--dry_run", "--workers", workers)
        assert sorted(tmp_path.rglob("*")) == before
        said = capsys.readouterr().out
        assert said.count("Would be written:") == 2
        assert "line 41 (bad): 'conversations' must be" in said and "line 42 (t.jsonl:42)" in said
    sharded(tmp_path, *arguments)
    facts = capsys.readouterr().out.splitlines()
    assert [fact for fact in facts if "rejected" not in fact] == [
        line
        for line in said.splitlines()
        if not line.startswith(("Would", "    line")) and "rejected" not in line
    ]
    with pytest.raises(InputError, match="already holds shards"):
        sharded(tmp_path, *arguments, "--dry_run")


def test_the_summary_is_what_the_manifest_says(tmp_path: Path, capsys):
    train = write(tmp_path / "t.jsonl", [record(0, "+-0"), record(1, "0"), {"id": "x"}])
    held_out = meta(tmp_path / "m.jsonl", 3)
    sharded(tmp_path, "--train", train, "--meta", held_out, "--num_shards", 2)
    out = tmp_path / "out"
    assert (
        capsys.readouterr().out
        == f"""\
{out}/meta: 6 meta records in 2 shards
  source:    m.jsonl
  records:   6 taken, 0 rejected
  steps:     0 +, 0 -, 6 unlabelled
  ranks:     1 or 2 ranks can share it
  questions: 3; 2 right, 4 wrong
{out}/train: 2 training records in 2 shards
  source:    t.jsonl
  records:   2 taken, 1 rejected (see {out}/train/rejected.jsonl)
  steps:     1 +, 1 -, 2 unlabelled; 1 records without any label
  ranks:     1 or 2 ranks can share it
"""
    )


# Messages


@pytest.mark.parametrize("arguments", [[], ["--train", "none.jsonl"], ["--nonsense", "1"]])
def test_ranks_of_mpirun_say_a_mistake_once(tmp_path: Path, arguments: list[str]):
    if shutil.which("mpirun") is None:
        pytest.skip("mpirun is not installed")
    command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "3", sys.executable]
    command += ["-m", "data_tools.shard", "--out", str(tmp_path / "out"), *arguments]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and done.stderr.count("error: ") == 1
