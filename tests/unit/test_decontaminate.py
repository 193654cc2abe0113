"""Decontamination: what training records are removed and why, and what is kept."""

import io
import subprocess
import sys

import numpy as np
import pytest
from json_lines import lines, write
from picture_files import exif, png, png_chunk, saved
from PIL import Image, ImageDraw

from data_tools.convert import main as convert_main
from data_tools.decontaminate import MAX_DISTANCE, main, perceptual_hash
from data_tools.shard import shard_file
from dreamprm_dist.data.images import decode_image
from dreamprm_dist.errors import InputError


def drawing(seed, size=(240, 180)):
    """A triangle on white: the kind of picture of which many look alike at first sight."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", size, "white")
    corners = [tuple(rng.integers(10, np.array(size) - 10).tolist()) for _ in range(3)]
    ImageDraw.Draw(image).polygon(corners, outline="black", width=2)
    return image


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def distance(one, other):
    one, other = (perceptual_hash(decode_image(data)) for data in (one, other))
    return int(np.unpackbits(one ^ other).sum())


def training(id, question, image=None):
    turn = f"### Question:\n{question}\n\n### Solution Process:\nstep"
    turns = [{"from": "human", "value": turn}, {"from": "gpt", "value": "+"}]
    return {"id": id, "conversations": turns} | ({"image": image} if image else {})


@pytest.fixture
def files(tmp_path):
    """Training records of which only `kept…` touch neither the test nor the meta set."""
    images = tmp_path / "train" / "images"
    images.mkdir(parents=True)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "t.png").write_bytes(encoded(drawing(0)))
    (images / "renamed.png").write_bytes(encoded(drawing(0)))
    (images / "small.jpg").write_bytes(encoded(drawing(0).resize((120, 90)), "JPEG", quality=60))
    (images / "other.png").write_bytes(encoded(drawing(1)))
    (images / "cut.png").write_bytes(encoded(drawing(2))[:-40])
    train = write(
        tmp_path / "train" / "train.jsonl",
        [
            training("kept1", "What is this?", "images/other.png"),
            training("bytes", "Anything", "images/renamed.png"),
            training("looks", "Anything", ["images/other.png", "images/small.jpg"]),
            training("text", "<image 1> how LONG is side AB"),
            training("both", "How long is side AB?", "images/renamed.png"),
            training("broken", "Anything", "images/cut.png"),
            training("meta", "Question: And the area?"),
            training("kept2", "How long is side AC?"),
        ],
    )
    test = write(
        tmp_path / "test" / "test.jsonl",
        [{"id": "t", "question": "Question: How long is side AB?", "image_path": "t.png"}],
    )
    meta = write(tmp_path / "meta.jsonl", [{**training("m", "And the area?"), "true_false": True}])
    return train, test, meta


def run(files, out, *flags):
    train, *against = map(str, files)
    main([train, "--against", *against, "--out", str(out), *flags])
    rejected = lines(out.with_suffix(".rejected.jsonl"))
    return [r["id"] for r in lines(out)], {r["id"]: r["reason"] for r in rejected}


def test_every_removed_record_has_its_reasons(files, tmp_path):
    _, test, meta = files
    kept, removed = run(files, tmp_path / "out" / "clean.jsonl")
    assert kept == ["kept1", "kept2"]
    assert removed["bytes"] == f"image 'images/renamed.png' is that of {test}, line 1"
    assert "'images/small.jpg' looks like that of" in removed["looks"]
    assert "bits differ" in removed["looks"] and "other.png" not in removed["looks"]
    assert removed["text"] == f"same question as {test}, line 1"
    assert removed["both"] == f"{removed['text']}; {removed['bytes']}"
    assert "truncated" in removed["broken"]
    assert removed["meta"] == f"same question as {meta}, line 1"
    clean = tmp_path / "out" / "clean.jsonl"
    assert lines(clean)[0]["image"] == "../train/images/other.png"
    assert shard_file(clean, tmp_path / "shards", "training", 2)["num_rejected"] == 0


@pytest.mark.parametrize(
    ("flags", "ids"),
    [
        (["--checks", "question"], {"text", "both", "meta"}),
        (["--checks", "image"], {"bytes", "both", "broken"}),
        (["--checks", "lookalike"], {"bytes", "looks", "both", "broken"}),
        (["--checks", "lookalike", "--max_distance", "0"], {"bytes", "both", "broken"}),
    ],
)
def test_checks_can_be_chosen(files, tmp_path, flags, ids):
    _, removed = run(files, tmp_path / "clean.jsonl", *flags)
    assert set(removed) == ids


@pytest.mark.parametrize("name", ["decontaminate", "overlap"])
def test_the_command_has_two_names(files, tmp_path, name):
    train, test, _ = map(str, files)
    out = tmp_path / "clean.jsonl"
    command = [sys.executable, "-m", f"data_tools.{name}", train, "--against", test, "--out"]
    done = subprocess.run([*command, str(out)], capture_output=True, text=True, check=True)
    rejected = out.with_suffix(".rejected.jsonl")
    assert done.stdout.splitlines() == [
        f"{out}: 3 records kept, 5 removed (see {rejected})",
        "(no data set): 5 of 8 removed (2 image, 1 lookalike, 2 question, 1 unreadable)",
    ]
    assert "warning: more than half of the records without a data set is removed" in done.stderr
    # What cannot be used is one sentence and exit code 2.
    done = subprocess.run([*command, str(out)], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {out}: is there already")


def test_what_cannot_be_protected_is_an_error(files, tmp_path):
    train, test, _ = files
    (tmp_path / "test" / "t.png").unlink()
    with pytest.raises(InputError, match=r"test.jsonl, line 1: image 't.png': no such"):
        main([str(train), "--against", str(test), "--out", str(tmp_path / "clean.jsonl")])
    with pytest.raises(InputError, match="overwrite the input"):
        main([str(train), "--against", str(test), "--out", str(test), "--overwrite"])
    assert not (tmp_path / "clean.jsonl").exists()


def test_questions_without_words_are_not_the_same(tmp_path):
    train = write(tmp_path / "train.jsonl", [training("a", "<image>?", "x.png")])
    Image.new("RGB", (20, 20), "white").save(tmp_path / "x.png")
    Image.new("RGB", (30, 20), "white").save(tmp_path / "y.png")
    test = write(tmp_path / "test.jsonl", [{"question": "<image>!", "image_path": "y.png"}])
    assert run((train, test), tmp_path / "out.jsonl") == (["a"], {})


QUESTION = "How many of the apples that lie in the left basket are red and have a leaf?"
PROMPT = "<image>\nYour task is to answer. Reason first.\n\nQuestion:\n\n{}"


def raw(question, **fields):
    step = {"step": "It is so.", "score": 0.5, "num_mc_correct": 8, "num_mc_total": 16}
    return {"question": question, "steps_with_score": [step], **fields}


def test_raw_and_converted_records_are_found_by_either_of_their_questions(tmp_path):
    Image.new("RGB", (20, 20), "white").save(tmp_path / "x.png")
    records = [
        raw(PROMPT.format(QUESTION + "\nA. 1\nB. 2"), image="x.png"),
        raw("<image>\nSee the picture.", question_orig=QUESTION, image="x.png"),
        raw("How many apples are red?", id="kept", image="x.png"),
        raw(PROMPT.format("How many apples are there?"), question_orig="Apples?", image="x.png"),
    ]
    source = write(tmp_path / "apples.jsonl", records)
    convert_main(["raw", str(source), "--out", str(tmp_path / "converted.jsonl")])
    options = "\n\nOptions: (A) 3 (B) 4 (C) 5"
    test = write(tmp_path / "test.jsonl", [{"question": f"Question: {QUESTION}{options}"}])
    for name, file in (("apples.jsonl", "raw"), ("converted.jsonl", "converted")):
        kept, removed = run((tmp_path / name, test), tmp_path / f"{file}_out.jsonl")
        assert kept == ["kept", "apples.jsonl:4"]
        assert set(removed) == {"apples.jsonl:1", "apples.jsonl:2"}
    # The other way round the instructions around a protected question do not protect it less.
    plain = write(tmp_path / "plain.jsonl", [training("t", QUESTION), training("k", "Pears?")])
    assert run((plain, source), tmp_path / "out.jsonl")[0] == ["k"]


def test_raw_records_keep_the_paths_where_their_images_were_found(tmp_path):
    found = tmp_path / "prm" / "images" / "geo" / "a.png"
    found.parent.mkdir(parents=True)
    found.write_bytes(encoded(drawing(0)))
    record = raw("Which?", image="VisualPRM400K-v1.1-Raw/geo/a.png")
    source = write(tmp_path / "prm" / "geo.jsonl", [record])
    test = write(tmp_path / "test.jsonl", [{"question": "Who?"}])
    run((source, test), tmp_path / "out" / "geo.jsonl")
    assert lines(tmp_path / "out" / "geo.jsonl")[0]["image"] == "../prm/images/geo/a.png"


def test_ids_are_filled_in_for_training_records_only(tmp_path):
    meta = {**training(-1, "Which one?"), "true_false": True}
    question = {"question": "And this one?"}
    records = [training(-1, "A?"), training(None, "B?"), training("x", "C?"), meta, question]
    records += [training(-1, "Who?"), {**meta, **training(-1, "Who?")}]
    source = write(tmp_path / "deep" / "train.jsonl", records)
    test = write(tmp_path / "test.jsonl", [{"question": "Who?"}])
    main([str(source), "--against", str(test), "--out", str(tmp_path / "out.jsonl")])
    assert [record.get("id") for record in lines(tmp_path / "out.jsonl")] == [
        "train.jsonl:1",
        "train.jsonl:2",
        "x",
        -1,
        None,
    ]
    rejected = lines(tmp_path / "out.rejected.jsonl")
    assert [entry["id"] for entry in rejected] == ["train.jsonl:6", -1]


def test_counts_by_data_set_and_a_warning_where_most_is_gone(tmp_path, capsys):
    def records(dataset, asked, others):
        questions = ["Who?"] * asked + [f"Which of {i}?" for i in range(others)]
        return [{**training(-1, question), "dataset": dataset} for question in questions]

    source = write(
        tmp_path / "all.jsonl",
        [*records("geo", 3, 2), *records("chart", 2, 2), *records("text", 0, 4), {"dataset": "z"}],
    )
    test = write(tmp_path / "test.jsonl", [{"question": "Who?"}])
    arguments = [str(source), "--against", str(test), "--out", str(tmp_path / "out.jsonl")]
    main(arguments)
    printed = capsys.readouterr()
    assert printed.out.splitlines()[1:] == [
        "chart: 2 of 4 removed (2 question)",
        "geo: 3 of 5 removed (3 question)",
        "z: 1 of 1 removed (1 unreadable)",
    ]
    warned = [line.partition(" is removed")[0] for line in printed.err.splitlines()]
    assert warned == ["warning: more than half of geo", "warning: more than half of z"]
    main([*arguments, "--limit", "4", "--overwrite"])
    assert "1 records kept, 3 removed" in capsys.readouterr().out
    assert [record["id"] for record in lines(tmp_path / "out.jsonl")] == ["all.jsonl:4"]
    with pytest.raises(InputError, match="--limit: must be 1 or more, not 0"):
        main([*arguments, "--limit", "0", "--overwrite"])


def test_copies_are_near_and_different_drawings_far():
    for seed in range(10):
        image = drawing(seed)
        original = encoded(image)
        transparent = image.convert("RGBA")
        transparent.putalpha(image.convert("L").point(lambda grey: 255 - grey))
        for copy in (
            encoded(image, "JPEG", quality=50),
            encoded(image.resize((480, 360))),
            encoded(image.resize((120, 90)), "WEBP", quality=60),
            encoded(image.convert("L")),
            encoded(transparent),
        ):
            assert distance(original, copy) <= MAX_DISTANCE
        assert distance(original, encoded(drawing(seed + 100))) > 3 * MAX_DISTANCE


def test_a_drawing_is_the_same_in_every_bit_depth_and_whichever_way_it_lies():
    for seed in range(5):
        image = drawing(seed)
        grey = np.asarray(image.convert("L"))[..., None]
        lying = image.transpose(Image.Transpose.ROTATE_90)
        for copy in (
            png(grey * np.uint16(257), 16, 0),
            png(grey // 17, 4, 0),
            png(grey // 17, 4, 0, png_chunk(b"tRNS", b"\0\x0f")),  # white is transparent
            png(grey // 255, 1, 0, png_chunk(b"tRNS", b"\0\1")),
            saved(lying, "JPEG", exif=exif(6)),
            saved(lying, "WEBP", exif=exif(6)),
        ):
            assert distance(encoded(image), copy) <= MAX_DISTANCE
        assert distance(encoded(image), encoded(lying)) > MAX_DISTANCE
