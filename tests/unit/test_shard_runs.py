"""Sharding as a job: a folder appears when it is whole, a killed run goes on, any workers."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

import data_tools.folders as folders
import data_tools.shard_pieces as pieces
import data_tools.sharding as sharding
import dreamprm_dist.data.json_records as json_records
from data_tools.folders import claim_folder, make_once
from data_tools.shard import main, shard_file
from data_tools.workers import start_workers
from dreamprm_dist.data.shards import REJECTED, ShardFolder
from dreamprm_dist.errors import InputError

REPO = Path(__file__).resolve().parents[2]


def record(i, **fields):
    turns = [{"from": "human", "value": f"step {i} é"}, {"from": "gpt", "value": "+"}]
    return {"id": f"id{i}", "image": f"{i % 10}.png", "conversations": turns, **fields}


def write_jsonl(path, records):
    path.write_text("\n".join(map(json.dumps, records)) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def train(tmp_path):
    for i in range(10):
        Image.new("RGB", (10 + i, 8), (i * 20, 0, 0)).save(tmp_path / f"{i}.png")
    return write_jsonl(tmp_path / "train.jsonl", [record(i) for i in range(100)])


def tree(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# A folder appears when it is complete


def test_an_existing_folder_is_kept_unless_overwrite(train, tmp_path):
    out = tmp_path / "out"
    shard_file(train, out, "training", 2)
    before = tree(out)
    with pytest.raises(ValueError, match="--overwrite"):
        shard_file(train, out, "training", 3)
    assert tree(out) == before
    shard_file(train, out, "training", 3, overwrite=True)
    assert ShardFolder(out).num_shards == 3 and len(tree(out)) == 5
    assert [p.name for p in tmp_path.glob("out*")] == ["out"]


def test_overwrite_never_replaces_a_folder_that_is_no_shard_folder(train, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is no shard folder"):
        shard_file(train, out, "training", 2, overwrite=True)
    assert (out / "thesis.txt").read_text() == "mine"


def test_a_failed_replacement_leaves_the_old_folder(train, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shard_file(train, out, "training", 2)
    before = tree(out)
    rename = Path.rename

    def fail_for_new(self, target):
        if self.name == "shards":
            raise OSError("disk full")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_new)
    with pytest.raises(OSError, match="disk full"):
        shard_file(train, out, "training", 3, overwrite=True)
    assert tree(out) == before
    monkeypatch.undo()
    shard_file(train, out, "training", 3, overwrite=True)
    assert ShardFolder(out).num_shards == 3
    assert [p.name for p in tmp_path.glob("out*")] == ["out"]


def test_a_folder_killed_between_the_two_renames_comes_back(train, tmp_path):
    out = tmp_path / "out"
    shard_file(train, out, "training", 2)
    before = tree(out)
    out.rename(tmp_path / "out.old-12345678")
    with pytest.raises(ValueError, match="--overwrite"):
        shard_file(train, out, "training", 3)
    assert tree(out) == before and [p.name for p in tmp_path.glob("out*")] == ["out"]


def test_a_run_that_ends_just_before_another_one_starts_is_not_replaced(
    train, tmp_path, monkeypatch
):
    out, flock = tmp_path / "out", folders.fcntl.flock

    def late(descriptor: int, how: int) -> None:
        """The other run's whole life, between opening the work folder and locking it."""
        monkeypatch.setattr(folders.fcntl, "flock", flock)
        folders.work_folder(out).rmdir()
        shard_file(train, out, "training", 2)
        flock(descriptor, how)

    monkeypatch.setattr(folders.fcntl, "flock", late)
    with pytest.raises(ValueError, match="already holds shards"):
        shard_file(train, out, "training", 5)
    assert ShardFolder(out).num_shards == 2
    assert [p.name for p in tmp_path.glob("out*")] == ["out"]


def test_a_live_run_is_not_disturbed(train, tmp_path):
    work, lock = claim_folder(tmp_path / "out", overwrite=False, job={})
    try:
        with pytest.raises(ValueError, match="is in use by process "):
            shard_file(train, tmp_path / "out", "training", 2)
        assert work.is_dir()
    finally:
        os.close(lock)
    shard_file(train, tmp_path / "out", "training", 2)
    assert [p.name for p in tmp_path.glob("out*")] == ["out"]


# A killed run is gone on with


class Killed(BaseException):
    """As the signal, it is nothing that the code could handle."""


def killed_at(call):
    """Like `map`, for a run that dies when it comes to its nth piece."""
    calls = []

    def in_order(function, items):
        for item in items:
            calls.append(item)
            if len(calls) == call:
                raise Killed
            yield function(item)

    return in_order


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(pieces, "BLOCK_RECORDS", 16)


@pytest.fixture
def made(monkeypatch):
    """The names of the files that are made, and not kept from an earlier run."""
    names = []

    def noted(write):
        def wrapper(*args):
            names.append(args[-1].name.partition(".")[0])
            return write(*args)

        return wrapper

    for function in ("_write_block", "_write_shard"):
        monkeypatch.setattr(pieces, function, noted(getattr(pieces, function)))
    return names


@pytest.mark.parametrize("call", range(1, 12))
def test_a_killed_run_is_gone_on_with_wherever_it_died(train, tmp_path, small_blocks, made, call):
    shard_file(train, tmp_path / "whole", "training", 4)
    everything = sorted(made)
    assert len(everything) == 11  # 7 blocks, 4 shards
    made.clear()
    with pytest.raises(Killed):
        shard_file(train, tmp_path / "out", "training", 4, in_order=killed_at(call))
    assert len(made) == call - 1 and not (tmp_path / "out").exists()
    shard_file(train, tmp_path / "out", "training", 4)
    assert sorted(made) == everything
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("piece", ["blocks/block-000002.arrow", "shards/shard-00001.parquet"])
@pytest.mark.parametrize("damage", [None, b"", b"x"])
def test_a_damaged_piece_is_made_again(train, tmp_path, small_blocks, made, piece, damage):
    shard_file(train, tmp_path / "whole", "training", 4)
    with pytest.raises(Killed):
        shard_file(train, tmp_path / "out", "training", 4, in_order=killed_at(11))
    made.clear()
    path = tmp_path / "out.partial" / piece
    path.unlink() if damage is None else path.write_bytes(damage)
    shard_file(train, tmp_path / "out", "training", 4)
    assert made == [path.stem, "shard-00003"]
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize("what", ["source", "image_root", "num_shards", "kind"])
def test_another_job_starts_anew(train, tmp_path, small_blocks, made, what):
    records = [record(i, true_false=True) for i in range(100)]
    write_jsonl(train, records)
    arguments = {"kind": "training", "num_shards": 4, "image_root": tmp_path}
    with pytest.raises(Killed):
        shard_file(train, tmp_path / "out", **arguments, in_order=killed_at(8))
    if what == "source":
        write_jsonl(train, [record(5), *records[1:]])
    else:
        shutil.copytree(tmp_path, tmp_path / "else", ignore=shutil.ignore_patterns("out*"))
        arguments[what] = {"image_root": tmp_path / "else", "num_shards": 3, "kind": "meta"}[what]
    made.clear()
    shard_file(train, tmp_path / "out", **arguments)
    assert len(made) == 7 + arguments["num_shards"]
    assert ShardFolder(tmp_path / "out").kind == arguments["kind"]


def test_an_error_of_the_machine_keeps_the_work_and_one_of_the_input_does_not(train, tmp_path):
    def full(function, items):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        shard_file(train, tmp_path / "out", "training", 4, in_order=full)
    assert (tmp_path / "out.partial").is_dir()
    with pytest.raises(ValueError, match="use at most 100"):
        shard_file(train, tmp_path / "out", "training", 101)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("function", "before", "again"),
    [
        ("make_block", [], ["meta", "training"]),  # the meta set's block is looked at again
        ("make_shard", ["meta"], ["training"]),
    ],
)
def test_a_command_killed_in_its_second_job_keeps_the_first(
    train, tmp_path, monkeypatch, function, before, again
):
    meta = write_jsonl(tmp_path / "meta.jsonl", [record(i, true_false=i > 3) for i in range(8)])
    out = tmp_path / "out"
    command = ["--train", str(train), "--meta", str(meta), "--out", str(out), "--num_shards", "1"]
    calls = []

    def make(job, *rest):
        calls.append(job.kind)
        if calls == ["meta", "training"]:
            raise Killed
        return getattr(pieces, function)(job, *rest)

    monkeypatch.setattr(sharding, function, make)
    with pytest.raises(Killed):
        main(command)
    assert [path.name for path in out.iterdir() if path.suffix != ".partial"] == before
    main(command)
    assert calls == ["meta", "training", *again]
    assert sorted(path.name for path in out.iterdir()) == ["meta", "train"]
    assert ShardFolder(out / "meta").num_rows == 8
    with pytest.raises(InputError, match="--overwrite"):
        main(command)


@pytest.mark.parametrize("moment", ["train.partial/blocks/*.json", "train.partial/shard-*.json"])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_command_killed_and_started_again(tmp_path, moment, workers):
    # Noise does not compress, so that the run lasts long enough to be killed in the middle.
    for i in range(3):
        Image.effect_noise((300, 300), 90).save(tmp_path / f"{i}.png")
    records = [record(i, image=f"{i % 3}.png") for i in range(900)]
    source = write_jsonl(tmp_path / "a.jsonl", records)
    shard_file(source, tmp_path / "whole", "training", 20)
    out = tmp_path / "shards"
    command = [sys.executable, "-m", "data_tools.shard", "--train", str(source)]
    command += ["--out", str(out), "--num_shards", "20", "--workers", workers]
    process = subprocess.Popen(command, cwd=REPO)
    deadline = time.monotonic() + 240
    while not list(out.glob(moment)):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert [p.name for p in out.iterdir()] == ["train.partial"]
    with pytest.raises(ValueError, match="sharding did not finish"):
        ShardFolder(out / "train.partial" / "shards")
    subprocess.run(command, cwd=REPO, check=True)
    assert tree(out / "train") == tree(tmp_path / "whole")
    assert [p.name for p in out.iterdir()] == ["train"]


# Any workers


@pytest.mark.parametrize("block_records", [1, 7, 100])
def test_bytes_do_not_depend_on_how_the_source_is_cut(train, tmp_path, monkeypatch, block_records):
    lines = train.read_text().splitlines()
    lines[3:3] = ["", "broken", "  ", json.dumps(record(0, image="none.png"))]
    lines.insert(90, "{}")
    train.write_text("\n\n" + "\n".join(lines) + "\n\n")
    shard_file(train, tmp_path / "one", "training", 3)
    monkeypatch.setattr(pieces, "BLOCK_RECORDS", block_records)
    shard_file(train, tmp_path / "two", "training", 3)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    rejected = [json.loads(x) for x in (tmp_path / "two" / REJECTED).read_text().splitlines()]
    assert [entry["line"] for entry in rejected] == [7, 9, 93]


def test_a_question_may_lie_in_several_blocks(train, tmp_path, small_blocks):
    records = [record(i, id=f"q{i % 5}", true_false=True) for i in range(100)]
    shard_file(write_jsonl(train, records), tmp_path / "out", "meta", 2)
    folder = ShardFolder(tmp_path / "out")
    assert folder.num_groups == 5
    for shard in (0, 1):
        expected = [(g, i) for g in range(shard, 5, 2) for i in range(g, 100, 5)]
        columns = (folder.read_column(shard, name) for name in ("group_id", "sample_id"))
        assert list(zip(*columns, strict=True)) == expected


def test_a_line_that_is_too_long_is_rejected_and_not_held(tmp_path, train):
    with train.open("ab") as file:
        file.write(b'{"id": "' + b"x" * (100 << 20) + b'"}\n' + json.dumps(record(7)).encode())
    program = """
import re, sys
from data_tools.shard import main
# Not getrusage: its peak begins with that of the process that started this one.
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = peak()
main(sys.argv[1:])
print((peak() - before) // 1024)
"""
    command = [sys.executable, "-c", program, "--train", str(train), "--out", str(tmp_path / "o")]
    done = subprocess.run(command, cwd=REPO, check=True, capture_output=True, text=True)
    assert (
        int(done.stdout.split()[-1]) < 130
    )  # MiB: two lines of the longest that is taken and the codecs
    assert ShardFolder(tmp_path / "o" / "train").num_rows == 101
    (entry,) = (tmp_path / "o" / "train" / REJECTED).read_text().splitlines()
    assert json.loads(entry)["line"] == 101 and "longer than 16 MiB" in entry


def test_a_block_ends_when_it_is_large(train, monkeypatch):
    size = len(train.read_bytes())
    monkeypatch.setattr(pieces, "BLOCK_BYTES", size // 3)
    blocks = list(pieces.find_blocks(train))
    assert len(blocks) == 3 and sum(block.num_records for block in blocks) == 100
    assert [b.start for b in blocks] == [0, *(b.end for b in blocks[:-1])]
    assert blocks[-1].end == size
    assert blocks[1].line == blocks[0].num_records + 1
    monkeypatch.setattr(json_records, "MAX_LINE_BYTES", 10)  # all lines too long, but lines still
    assert list(pieces.find_blocks(train)) == blocks


def kill_self(item):
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def test_a_killed_worker_is_told():
    with (
        start_workers(2) as in_order,
        pytest.raises(ChildProcessError, match="a worker was killed"),
    ):
        list(in_order(kill_self, range(10)))


def test_results_come_in_order_and_errors_come_through():
    for count in (1, 2):
        with start_workers(count) as in_order:
            assert list(in_order(str, range(20))) == [str(i) for i in range(20)]
            with pytest.raises(ValueError, match="invalid literal"):
                list(in_order(int, ["1", "x", "2"]))
    with pytest.raises(ValueError, match="1 or more"), start_workers(0):
        pass


def test_a_file_is_made_once(tmp_path):
    def make(path):
        path.write_text("made")
        return {"rows": 1}

    path, note = tmp_path / "file", tmp_path / "note.json"
    first = make_once(path, note, make)
    assert first["rows"] == 1 and make_once(path, note, lambda _: pytest.fail("again")) == first
    note.write_text("{")
    assert make_once(path, note, make) == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "note.json"]


def test_ranks_of_mpirun_are_workers(train, tmp_path):
    if shutil.which("mpirun") is None:
        pytest.skip("mpirun is not installed")
    shard_file(train, tmp_path / "whole", "training", 4)
    command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "3"]
    command += [sys.executable, "-m", "data_tools.shard", "--train", str(train)]
    command += ["--out", str(tmp_path / "out"), "--num_shards", "4"]

    def run(*more):
        return subprocess.run(
            [*command, *more], cwd=REPO, capture_output=True, text=True, timeout=120
        )

    done = run()
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("100 training records in 4 shards") == 1
    assert tree(tmp_path / "out" / "train") == tree(tmp_path / "whole")
    again = run()
    assert again.returncode != 0 and again.stderr.count("--overwrite") == 1
    both = run("--workers", "2")
    assert both.returncode != 0 and "the ranks are the workers" in both.stderr
