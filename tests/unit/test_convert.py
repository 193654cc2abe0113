"""Downloaded files to records: what is written, what is rejected, and in how much memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from json_lines import lines, write
from PIL import Image

import dreamprm_dist.data.json_records as json_records
from data_tools.convert import convert_raw, main
from data_tools.shard import shard_file
from dreamprm_dist.data.json_records import read_json_records
from dreamprm_dist.errors import InputError, RecordError
from dreamprm_dist.prm.solutions import SYSTEM_PROMPT

REPO = Path(__file__).resolve().parents[2]


def raw(*scores, **fields):
    steps = [
        {"step": f"step {i} é", "score": score, "num_mc_correct": 4 * score, "num_mc_total": 4}
        for i, score in enumerate(scores)
    ]
    return {"question": "How many?", "steps_with_score": steps, **fields}


def turns(*labels):
    result = [{"from": "human", "value": "### Question:\nQ\n\n### Solution Process:\nS"}]
    for label in labels:
        result += [{"from": "gpt", "value": label}, {"from": "human", "value": "next"}]
    return result[:-1]


def image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 8), "red").save(path)
    return path


def labels(record):
    return [turn["value"] for turn in record["conversations"] if turn["from"] == "gpt"]


# Raw VisualPRM400K


def test_raw_record_in_the_layout_of_the_released_checkpoints():
    record = convert_raw(raw(0.5, 0.0, image="a.png", id=7, dataset="d", answer="3"))
    assert record == {
        "id": 7,
        "image": "a.png",
        "dataset": "d",
        "conversations": [
            {"from": "system", "value": SYSTEM_PROMPT},
            {
                "from": "human",
                "value": "### Question:\nHow many?\n\n### Solution Process:\nstep 0 é",
            },
            {"from": "gpt", "value": "+", "num_mc_correct": 2, "num_mc_total": 4},
            {"from": "human", "value": "step 1 é"},
            {"from": "gpt", "value": "-", "num_mc_correct": 0, "num_mc_total": 4},
        ],
    }


def test_threshold_unvisited_steps_and_stopping_at_the_first_minus():
    record = raw(1.0, 0.25, 0.0, 0.5)
    assert labels(convert_raw(record)) == ["+", "+", "-", "+"]
    assert labels(convert_raw(record, threshold=0.25)) == ["+", "-", "-", "+"]
    assert labels(convert_raw(record, stop_at_first_minus=True)) == ["+", "+", "-"]
    record["steps_with_score"][2]["num_mc_total"] = 0  # its score says nothing
    assert labels(convert_raw(record)) == ["+", "+", None, "+"]
    assert labels(convert_raw(record, stop_at_first_minus=True)) == ["+", "+", None, "+"]
    record["steps_with_score"][2]["score"] = None
    assert labels(convert_raw(record)) == ["+", "+", None, "+"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"question": " "}, "'question'"),
        ({"conversations": []}, "use `convert conversations`"),
        ({"steps_with_score": []}, "'steps_with_score' must be"),
        ({"steps_with_score": ["s"]}, r"steps_with_score\[0\] has no text"),
        ({"steps_with_score": [{"step": "s", "score": None}]}, "'score' must be a finite"),
        ({"steps_with_score": [{"step": "s", "score": float("nan")}]}, "'score' must be a finite"),
        ({"steps_with_score": [{"step": "s", "score": True}]}, "'score' must be a finite"),
        ({"image": 3}, "'image' must be text"),
        ({"question": "<image> <image>", "image": "a"}, "2 <image> for 1 image"),
    ],
)
def test_bad_raw_records(fields, message):
    with pytest.raises(RecordError, match=message):
        convert_raw(raw(1.0, **{"image": None, **fields}))


def test_a_file_a_data_set_and_paths_that_sharding_finds(tmp_path):
    for name in ("geo", "chart"):
        for i in range(3):
            image(tmp_path / "in" / f"{name}_images" / f"{i}.png")
    absolute = image(tmp_path / "else" / "x.png")
    geo = write(
        tmp_path / "in" / "geo.jsonl",
        [
            raw(1.0, image="geo_images/0.png"),
            raw(1.0, image=["geo_images/1.png", "geo_images/2.png"]),
            raw(1.0, image=str(absolute)),
        ],
    )
    chart = write(
        tmp_path / "in" / "chart.jsonl",
        [raw(0.0), raw(0.0, image="chart_images/0.png"), raw(1.0, image="images/0.png")],
    )
    out = tmp_path / "deep" / "er" / "train.jsonl"
    main(["raw", str(geo), str(chart), "--out", str(out)])
    written = lines(out)
    assert [record["dataset"] for record in written] == ["geo"] * 3 + ["chart"] * 2
    assert [record["id"] for record in written] == [
        *(f"geo.jsonl:{line}" for line in (1, 2, 3)),
        *(f"chart.jsonl:{line}" for line in (1, 2)),
    ]
    assert written[0]["image"] == "../../in/geo_images/0.png"
    assert written[2]["image"] == str(absolute)
    assert "image" not in written[3]
    (rejected,) = lines(out.with_suffix(".rejected.jsonl"))
    assert (rejected["file"], rejected["line"]) == (str(chart), 3)
    assert "'images/0.png'" in rejected["reason"] and "--image_root" in rejected["reason"]
    assert shard_file(out, tmp_path / "shards", "training", 2)["num_rejected"] == 0


def test_image_root_and_no_image_check(tmp_path):
    image(tmp_path / "root" / "a" / "0.png")
    source = write(tmp_path / "geo.jsonl", [raw(1.0, image="a/0.png"), raw(1.0, image="b.png")])
    out = tmp_path / "out.jsonl"
    flags = ["--out", str(out), "--image_root", str(tmp_path / "root")]
    main(["raw", str(source), *flags])
    assert [record["image"] for record in lines(out)] == ["root/a/0.png"]
    main(["raw", str(source), *flags, "--no_image_check", "--overwrite"])
    assert [record["image"] for record in lines(out)] == ["root/a/0.png", "root/b.png"]


def test_inputs_of_one_name_and_files_that_are_there_are_refused(tmp_path):
    one = write(tmp_path / "a" / "geo.jsonl", [raw(1.0)])
    two = write(tmp_path / "b" / "geo.jsonl", [raw(1.0)])
    out = tmp_path / "out.jsonl"
    with pytest.raises(InputError, match="several inputs are named geo"):
        main(["raw", str(one), str(two), "--out", str(out)])
    main(["raw", str(one), "--out", str(out)])
    with pytest.raises(InputError, match="pass --overwrite"):
        main(["raw", str(one), "--out", str(out)])
    with pytest.raises(InputError, match="overwrite the input"):
        main(["raw", str(out), "--out", str(out), "--overwrite"])
    with pytest.raises(FileNotFoundError, match="no such file"):
        main(["raw", str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "new.jsonl")])
    with pytest.raises(InputError, match=r"geo.jsonl, line 1: it is a raw record"):
        main(["conversations", str(one), "--out", str(tmp_path / "new.jsonl")])
    assert {path.name for path in tmp_path.iterdir()} == {
        "a",
        "b",
        "out.jsonl",
        "out.rejected.jsonl",
    }


# Conversations and the reference's files


def test_conversations_with_bom_crlf_repeated_ids_and_garbage(tmp_path, monkeypatch):
    monkeypatch.setattr(json_records, "MAX_LINE_BYTES", 2000)
    good = [{"id": i, "conversations": turns("+", None, "-")} for i in (-1, -1, "x", "x", None)]
    text = [json.dumps(record).encode() for record in good]
    bad = [b"{", b"7", b"\xff\xfe", b"[" * 1900, b"z" * 5000, json.dumps({"id": "no"}).encode()]
    bad.append(json.dumps({"id": "y", "conversations": turns("maybe")}).encode())
    source = tmp_path / "mavis.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join([*text, b"", *bad, text[0]]))
    out = tmp_path / "train.jsonl"
    main(["conversations", str(source), "--out", str(out)])
    written = lines(out)
    named = [f"mavis.jsonl:{line}" for line in (1, 2, 5, 14)]
    assert [record["id"] for record in written] == [*named[:2], "x", "x", *named[2:]]
    assert {record["dataset"] for record in written} == {"mavis"}
    assert all(record["conversations"] == turns("+", None, "-") for record in written)
    rejected = lines(tmp_path / "train.rejected.jsonl")
    assert [entry["line"] for entry in rejected] == list(range(7, 14))
    assert [entry["id"] for entry in rejected[-2:]] == ["no", "y"]
    reasons = [entry["reason"] for entry in rejected]
    assert "longer than" in reasons[4] and "'maybe'" in reasons[6]
    assert all("not valid JSON" in reasons[i] for i in (0, 2, 3))


def test_a_line_at_the_limit_is_taken_and_one_byte_more_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(json_records, "MAX_LINE_BYTES", 20)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"id": "abcdefghi"}\n{"id": "abcdefghij"}\n{"id": 1}')
    (_, first), (_, second), (number, third) = read_json_records(path)
    assert (first, number, third) == ({"id": "abcdefghi"}, 3, {"id": 1})
    assert isinstance(second, RecordError)


def test_reference_meta_records_stay_as_they_are(reference_dir, tmp_path):
    source = reference_dir / "mmmu_pro_meta_sample.json"
    out = tmp_path / "meta.jsonl"
    main(["reference", str(source), "--kind", "meta", "--out", str(out), "--no_image_check"])
    originals = [record for _, record in read_json_records(source)]
    written = lines(out)
    assert len(written) == len(originals) == 160
    for record, original in zip(written, originals, strict=True):
        assert record["image"].endswith(original["image"])
        assert {**record, "image": None} == {**original, "image": None}


def test_reference_training_records_get_no_data_set(tmp_path):
    source = tmp_path / "train.json"
    source.write_text(json.dumps([{"id": "a", "conversations": turns("+"), "extra": 1}] * 2))
    main(["reference", str(source), "--kind", "training", "--out", str(tmp_path / "out.jsonl")])
    assert lines(tmp_path / "out.jsonl") == [{"id": "a", "conversations": turns("+")}] * 2


# Memory


def test_memory_does_not_grow_with_the_file_nor_with_a_line_of_garbage(tmp_path):
    with (tmp_path / "big.jsonl").open("wb") as file:
        line = json.dumps({"id": "é", "conversations": turns("+")}).encode() + b"\n"
        file.write(line * 20_000 + b"garbage " * (100 << 17) + b"\n" + line)
    code = """
import re, sys
from data_tools.convert import main
# Not getrusage: its peak begins with that of the process that started this one.
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = peak()
main(["conversations", sys.argv[1], "--out", sys.argv[2]])
print((peak() - before) // 1024)
"""
    command = [sys.executable, "-c", code, tmp_path / "big.jsonl", tmp_path / "out.jsonl"]
    run = subprocess.run(command, cwd=REPO, check=True, capture_output=True, text=True)
    message, grown = run.stdout.splitlines()
    assert "20001 records, 1 rejected" in message
    assert int(grown) < 60  # MiB: two lines of the longest that is taken, and the interpreter
    assert lines(tmp_path / "out.rejected.jsonl")[0]["line"] == 20_001
