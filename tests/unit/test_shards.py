"""Shard folders: what is written, what is refused, and how they are read."""

import hashlib
import io
import json
import multiprocessing
import os
import pickle
import shutil
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

import data_tools.shard as shard_module
from data_tools.shard import cached_shards, main, shard_file
from data_tools.workers import start_workers
from dreamprm_dist.data.shards import MANIFEST, REJECTED, ShardFolder
from dreamprm_dist.errors import InputError

REPO = Path(__file__).resolve().parents[2]


def write_image(path, color, size=(12, 8)):
    Image.new("RGB", size, color).save(path)
    return path.name


def record(i, image=None, question="Q?", **fields):
    conversations = [
        {"from": "human", "value": f"{question}"},
        {"from": "human", "value": f"step {i} é"},
        {"from": "gpt", "value": "+" if i % 2 else None},
    ]
    return {"id": f"id{i}", "image": image, "conversations": conversations, **fields}


def write_jsonl(path, records):
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def images(tmp_path):
    return [write_image(tmp_path / f"{i}.png", (i * 20, 0, 0), (10 + i, 8)) for i in range(10)]


@pytest.fixture
def train(tmp_path, images):
    records = [record(i, images[i % 10], dataset=f"d{i % 3}") for i in range(100)]
    return write_jsonl(tmp_path / "train.jsonl", records)


def rejected(folder):
    return [json.loads(line) for line in (folder / REJECTED).read_text().splitlines()]


def tree(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# What is written


def test_training_shards_follow_the_id_formula(train, tmp_path, images):
    manifest = shard_file(train, tmp_path / "out", "training", 3)
    folder = ShardFolder(tmp_path / "out")
    assert (folder.kind, folder.num_shards, folder.num_rows) == ("training", 3, 100)
    assert folder.rows_per_shard == [34, 33, 33]
    for shard, rows in enumerate(folder.rows_per_shard):
        for j in range(rows):
            row = folder.read(shard, j)
            i = j * 3 + shard
            assert (row["sample_id"], row["source_id"]) == (i, f"id{i}")
            assert row["conversations"] == record(i)["conversations"]
            assert row["images"] == [(tmp_path / images[i % 10]).read_bytes()]
            assert row["image_sizes"] == [[10 + i % 10, 8]]
            assert row["dataset"] == f"d{i % 3}"
            assert set(row) == {
                "sample_id",
                "source_id",
                "dataset",
                "conversations",
                "images",
                "image_sizes",
            }
    folder.verify()
    assert folder.read_column(1, "sample_id") == list(range(1, 100, 3))
    assert folder.read_column(1, "conversations")[0] == record(1)["conversations"]
    assert manifest == json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["source"] == {
        "path": "train.jsonl",
        "sha256": hashlib.sha256(train.read_bytes()).hexdigest(),
    }
    assert (manifest["num_groups"], manifest["num_rejected"]) == (None, 0)
    assert rejected(tmp_path / "out") == []


def test_row_groups_hold_at_most_16_rows_and_no_image_statistics(train, tmp_path):
    shard_file(train, tmp_path / "out", "training", 3)
    for path in (tmp_path / "out").glob("*.parquet"):
        metadata = pq.ParquetFile(path).metadata
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        assert len(groups) == 3 and max(group.num_rows for group in groups) == 16
        columns = [group.column(i) for group in groups for i in range(group.num_columns)]
        assert not any(column.is_stats_set for column in columns)
        (images,) = {c.compression for c in columns if c.path_in_schema.startswith("images.")}
        assert images == "UNCOMPRESSED"


def test_meta_groups_by_id_else_by_image_and_question(tmp_path, images):
    same_pixels = shutil.copy(tmp_path / images[0], tmp_path / "copy.png")
    first_step = "\n\n### Solution Process:\nstep "
    rows = [
        ({"id": "a"}, images[0], "Q?"),
        ({"id": -1}, images[0], "Q?"),
        ({"id": -1}, images[0], "Other?"),
        ({"id": "b"}, images[0], "Q?"),
        ({"id": "a"}, images[1], "Else"),  # the id alone decides
        ({"id": -1}, images[1], "Q?"),
        ({"id": -1}, os.path.basename(same_pixels), "Q?"),  # bytes, not the path
        ({"id": None}, images[0], "Q?" + first_step + "one"),  # the first step is no question
        ({"id": "-1"}, images[0], "Q?" + first_step + "two"),
    ]
    records = [
        record(i, image, question, true_false=i % 2 == 0, response=f"r{i}") | fields
        for i, (fields, image, question) in enumerate(rows)
    ]
    manifest = shard_file(
        write_jsonl(tmp_path / "meta.jsonl", records), tmp_path / "out", "meta", 2
    )
    folder = ShardFolder(tmp_path / "out")
    groups = {0: [0, 4], 1: [1, 6, 7, 8], 2: [2], 3: [3], 4: [5]}
    assert manifest["num_groups"] == folder.num_groups == 5
    for shard in (0, 1):
        expected = [(g, i) for g in sorted(groups) if g % 2 == shard for i in groups[g]]
        read = [folder.read(shard, j) for j in range(folder.rows_per_shard[shard])]
        assert [(row["group_id"], row["sample_id"]) for row in read] == expected
        for row in read:
            assert row["true_false"] is (row["sample_id"] % 2 == 0)
            assert row["response"] == f"r{row['sample_id']}"
        assert folder.read_column(shard, "group_id") == [g for g, _ in expected]


def test_repeated_ids_and_minus_one_keep_their_own_sample_id(tmp_path):
    records = [record(i, id=source_id) for i, source_id in enumerate(["x", "x", -1, -1, None, 7])]
    shard_file(write_jsonl(tmp_path / "a.jsonl", records), tmp_path / "out", "training", 1)
    folder = ShardFolder(tmp_path / "out")
    assert folder.read_column(0, "sample_id") == list(range(6))
    places = [f"a.jsonl:{line}" for line in (3, 4, 5)]
    assert folder.read_column(0, "source_id") == ["x", "x", *places, "7"]
    assert folder.read(0, 0)["images"] == []


def test_several_images_keep_their_order(tmp_path, images):
    records = [record(1, [images[3], images[1], images[3]])]
    shard_file(write_jsonl(tmp_path / "a.jsonl", records), tmp_path / "out", "training", 1)
    row = ShardFolder(tmp_path / "out").read(0, 0)
    assert row["image_sizes"] == [[13, 8], [11, 8], [13, 8]]
    assert row["images"] == [(tmp_path / images[i]).read_bytes() for i in (3, 1, 3)]


def test_json_list_bom_and_crlf_give_the_same_shards_as_jsonl(train, tmp_path):
    records = [json.loads(line) for line in train.read_text().splitlines()]
    as_list = tmp_path / "list.json"
    as_list.write_bytes(b"\xef\xbb\xbf" + json.dumps(records, indent=1).encode())
    windows = tmp_path / "windows.jsonl"
    windows.write_bytes(b"\xef\xbb\xbf" + train.read_bytes().replace(b"\n", b"\r\n\r\n"))
    shas = [
        [s["sha256"] for s in shard_file(path, tmp_path / f"out{i}", "training", 2)["shards"]]
        for i, path in enumerate((train, as_list, windows))
    ]
    assert shas[0] == shas[1] == shas[2]


def test_image_root_and_absolute_paths(tmp_path):
    (tmp_path / "pictures").mkdir()
    write_image(tmp_path / "pictures" / "a.png", "red")
    outside = tmp_path / "b.png"
    write_image(outside, "blue")
    source = write_jsonl(tmp_path / "a.jsonl", [record(0, "a.png"), record(1, str(outside))])
    root = tmp_path / "pictures"
    assert shard_file(source, tmp_path / "out", "training", 2, image_root=root)["num_rows"] == 2
    assert shard_file(source, tmp_path / "out2", "training", 1)["num_rejected"] == 1


def test_any_number_of_workers_writes_the_same_bytes(train, tmp_path):
    with train.open("a") as file:
        file.write("broken\n" + json.dumps(record(0, "missing.png")) + "\n")
    shard_file(train, tmp_path / "one", "training", 3)
    time.sleep(1.1)  # a time stamp in seconds would differ
    with start_workers(2) as in_order:
        shard_file(train, tmp_path / "two", "training", 3, in_order=in_order)
    assert len(tree(tmp_path / "one")) == 5
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_a_second_call_sees_images_that_changed_since_the_first(train, tmp_path):
    shard_file(train, tmp_path / "one", "training", 2)
    write_image(tmp_path / "0.png", "white", (5, 6))
    shard_file(train, tmp_path / "two", "training", 2)
    assert ShardFolder(tmp_path / "two").read(0, 0)["image_sizes"] == [[5, 6]]


# What is not taken


def test_every_rejected_record_has_a_line_with_its_reason(tmp_path, images, capsys):
    Image.effect_noise((64, 64), 90).save(tmp_path / "noise.png")
    good = (tmp_path / "noise.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(good[: len(good) // 2])
    (tmp_path / "page.png").write_bytes(b"<html>")
    with (tmp_path / "sparse.png").open("wb") as file:
        file.truncate(1 << 40)
    os.mkfifo(tmp_path / "pipe.png")  # reading it would wait for ever
    step = record(4)["conversations"]
    bad = [
        ('{"id": "broken"', "a.jsonl:2", "not valid JSON"),
        (record(1, "missing.png"), "id1", "'missing.png': no such file"),
        (record(2, "cut.png"), "id2", "'cut.png': the image is truncated or broken"),
        (record(3, "page.png"), "id3", "'page.png': not an image"),
        (record(4, conversations=step[:2]), "id4", "has no step"),
        (record(5, conversations=[*step[:2], {"from": "gpt", "value": "ok"}]), "id5", "'ok'"),
        (record(6, "sparse.png"), "id6", "'sparse.png': larger than 64 MiB"),
        (record(7, "pipe.png"), "id7", "'pipe.png': is a device or pipe"),
        (record(8, "a\0.png"), "id8", "no such file"),
        (record(9, id="\ud800"), "\ud800", "surrogate"),
        (record(10, id=[1]), "a.jsonl:12", "'id' must be text"),
    ]
    source = write_jsonl(
        tmp_path / "a.jsonl", [record(0, images[0]), *(b for b, _, _ in bad), record(99)]
    )
    main(["--train", str(source), "--out", str(tmp_path / "out"), "--num_shards", "2"])
    out = tmp_path / "out" / "train"
    found = rejected(out)
    assert [entry["line"] for entry in found] == list(range(2, 2 + len(bad)))
    for entry, (_, source_id, reason) in zip(found, bad, strict=True):
        assert set(entry) == {"line", "id", "reason"}
        assert entry["id"] == source_id and reason in entry["reason"]
    folder = ShardFolder(out)
    assert (folder.num_rows, folder.manifest["num_rejected"]) == (2, len(bad))
    assert [folder.read(s, 0)["source_id"] for s in (0, 1)] == ["id0", "id99"]
    printed = capsys.readouterr().out
    assert f"{len(bad)} rejected" in printed and str(out / REJECTED) in printed


def test_meta_without_true_false_is_rejected(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [record(0), record(1, true_false=True)])
    assert shard_file(source, tmp_path / "out", "meta", 1)["num_rejected"] == 1
    assert "'true_false'" in rejected(tmp_path / "out")[0]["reason"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nonsense\n[]\n", "all 2 records were rejected.*at line 1, because: not valid JSON"),
        ("", "holds no record"),
        ("[]", "holds no record"),
    ],
)
def test_nothing_accepted_is_an_error_and_leaves_nothing(tmp_path, content, message):
    source = tmp_path / "a.jsonl"
    source.write_text(content)
    with pytest.raises(ValueError, match=message):
        shard_file(source, tmp_path / "out", "training", 1)
    assert list(tmp_path.iterdir()) == [source]


def test_too_many_shards_names_the_number_that_works(tmp_path):
    records = [record(i, id="abc"[i % 3], true_false=True) for i in range(5)]
    source = write_jsonl(tmp_path / "a.jsonl", records)
    with pytest.raises(ValueError, match="use at most 5 shards"):
        shard_file(source, tmp_path / "out", "training", 6)
    with pytest.raises(ValueError, match=r"3 questions.*use at most 3 shards"):
        shard_file(source, tmp_path / "out", "meta", 4)
    assert shard_file(source, tmp_path / "t", "training", 5)["num_rows"] == 5
    assert shard_file(source, tmp_path / "m", "meta", 3)["num_rows"] == 5


def test_a_missing_source_and_a_malformed_list_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        shard_file(tmp_path / "none.json", tmp_path / "out", "training", 1)
    source = tmp_path / "a.json"
    source.write_text('[{"id": 1},\n')
    with pytest.raises(ValueError, match="line 2, column 1"):
        shard_file(source, tmp_path / "out", "training", 1)


def test_a_source_that_changes_meanwhile_is_noticed(train, tmp_path):
    def change_then_map(function, items):
        train.write_text(train.read_text() + "\n")
        return map(function, items)

    with pytest.raises(ValueError, match="changed while"):
        shard_file(train, tmp_path / "out", "training", 2, in_order=change_then_map)
    assert not list(tmp_path.glob("out*"))


# Reading


def edit_manifest(folder, **fields):
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture
def folder(train, tmp_path):
    shard_file(train, tmp_path / "out", "training", 2)
    return tmp_path / "out"


def test_verify_names_the_file_with_a_flipped_byte(folder):
    ShardFolder(folder).verify()
    path = folder / "shard-00001.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"shard-00001\.parquet: SHA-256 differs"):
        ShardFolder(folder).verify()


def test_a_folder_that_cannot_be_read_says_why(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such shard folder"):
        ShardFolder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="sharding did not finish"):
        ShardFolder(tmp_path)
    original = (folder / MANIFEST).read_text()
    shards = json.loads(original)["shards"]
    outside = [{**shards[0], "file": "../x.parquet"}, shards[1]]
    for fields, message in [
        ({"format_version": 3}, "format version 3, but this release reads 1 and 2"),
        ({"kind": "test"}, "unknown kind 'test'"),
        ({"num_rows": 0, "num_shards": 0, "shards": []}, f"{folder}: the training data set is"),
        ({"num_rows": 99}, "contradicts itself"),
        ({"num_shards": 3}, "contradicts itself"),
        ({"shards": outside}, "contradicts itself"),
        ({"shards": None}, "damaged manifest"),
    ]:
        edit_manifest(folder, **fields)
        with pytest.raises(ValueError, match=message):
            ShardFolder(folder)
        (folder / MANIFEST).write_text(original)
    (folder / MANIFEST).write_text(original[:50])
    with pytest.raises(ValueError, match="damaged manifest"):
        ShardFolder(folder)
    (folder / MANIFEST).write_text(original)
    (folder / "shard-00001.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-00001\.parquet"):
        ShardFolder(folder)


def test_a_damaged_shard_is_named(folder):
    reader = ShardFolder(folder)
    (folder / "shard-00000.parquet").write_bytes(b"PAR1 no PAR1")
    with pytest.raises(ValueError, match=r"shard-00000\.parquet: cannot be read"):
        reader.read(0, 0)
    shutil.copy(folder / "shard-00001.parquet", folder / "shard-00000.parquet")
    edit_manifest(
        folder,
        num_rows=101,
        shards=[
            {"file": f"shard-0000{i}.parquet", "rows": rows, "sha256": ""}
            for i, rows in enumerate((51, 50))
        ],
    )
    with pytest.raises(ValueError, match="has 50 rows where the manifest says 51"):
        ShardFolder(folder).read(0, 0)


def test_wrong_shard_row_or_column(folder):
    reader = ShardFolder(folder)
    for shard, row in [(2, 0), (-1, 0), (0, 50), (0, -1)]:
        with pytest.raises(IndexError):
            reader.read(shard, row)
    with pytest.raises(IndexError):
        reader.read_column(2, "sample_id")
    with pytest.raises(ValueError, match="no column 'group_id'; use one of sample_id"):
        reader.read_column(0, "group_id")


def test_row_groups_are_cached_and_the_cache_is_bounded(folder, monkeypatch):
    decoded = []
    read_row_group = pq.ParquetFile.read_row_group

    def counted(self, i, *args, **kwargs):
        decoded.append(i)
        return read_row_group(self, i, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    reader = ShardFolder(folder, cache_row_groups=2)
    for row in [0, 15, 5, 16, 31, 0]:  # groups 0 and 1 only
        reader.read(0, row)
    assert decoded == [0, 1]
    reader.read(0, 32)  # group 2 pushes out group 1, which was used before group 0
    reader.read(0, 0)
    assert decoded == [0, 1, 2]
    reader.read(0, 16)
    assert decoded == [0, 1, 2, 1]
    first = reader.read(0, 0)
    first["images"].clear()
    assert reader.read(0, 0)["images"], "a caller's change must not reach the cache"


def read_ids(reader, queue):
    inherited = [file for file, _ in reader._open_files.values()]
    ids = [reader.read(s, r)["sample_id"] for s in (0, 1) for r in range(50)]
    shared = any(file is old for file, _ in reader._open_files.values() for old in inherited)
    queue.put((ids, shared))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_reader_in_use_can_go_to_other_processes(folder, method):
    reader = ShardFolder(folder)
    expected = [reader.read(s, r)["sample_id"] for s in (0, 1) for r in range(50)]
    state = pickle.dumps(reader)
    assert len(state) < 10_000, "handles or cached images were pickled"
    assert pickle.loads(state).read(1, 3) == reader.read(1, 3)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=read_ids, args=(reader, queue))
    process.start()
    ids, shared = queue.get(timeout=60)
    assert ids == expected and not shared
    process.join()


# Command line and cache


def test_command_line_writes_both_folders(train, tmp_path):
    meta = write_jsonl(tmp_path / "meta.jsonl", [record(i, true_false=True) for i in range(4)])
    out = tmp_path / "out"
    arguments = ["--train", str(train), "--meta", str(meta), "--out", str(out)]
    arguments += ["--num_shards", "4", "--meta_num_shards", "2"]
    main(arguments)
    assert ShardFolder(out / "train").num_shards == 4
    assert ShardFolder(out / "meta").num_shards == 2
    with pytest.raises(InputError, match=r"--overwrite"):
        main(arguments)
    main([*arguments, "--overwrite"])
    with pytest.raises(InputError, match="give --train, --meta or both"):
        main(["--out", str(out)])
    with pytest.raises(FileNotFoundError, match="no such file"):
        main(["--train", str(tmp_path / "none"), "--out", str(tmp_path / "other")])


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "example: python -m data_tools.shard" in capsys.readouterr().out


def test_cached_shards_are_built_once_for_a_content(train, tmp_path, monkeypatch):
    sha = hashlib.sha256(train.read_bytes()).hexdigest()
    folder = cached_shards(train, "training", 2)
    assert folder == tmp_path / ".shards" / f"train-training-2-{sha[:12]}-v2"
    assert ShardFolder(folder).num_rows == 100
    with monkeypatch.context() as patch:
        patch.setattr(shard_module, "shard_file", lambda *_: pytest.fail("built again"))
        assert cached_shards(train, "training", 2) == folder
    (tmp_path / "elsewhere").mkdir()
    for name in tmp_path.glob("*.png"):
        write_image(tmp_path / "elsewhere" / name.name, "green")
    other_root = cached_shards(train, "training", 2, image_root=tmp_path / "elsewhere")
    assert other_root != folder
    image = ShardFolder(other_root).read(0, 0)["images"][0]
    assert Image.open(io.BytesIO(image)).getpixel((0, 0)) == (0, 128, 0)
    train.write_text(train.read_text() + json.dumps(record(100)) + "\n")
    assert ShardFolder(cached_shards(train, "training", 2)).num_rows == 101
    with pytest.raises(FileNotFoundError, match="no such file"):
        cached_shards(tmp_path / "none.json", "training", 2)
