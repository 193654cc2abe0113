"""Decontamination: what training records are removed and why, and what is kept."""

import io
import subprocess
import sys

import numpy as np
import pytest
from json_lines import lines, write
from PIL import Image, ImageDraw

from data_tools.decontaminate import MAX_DISTANCE, main, normalised_question, perceptual_hash
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
    assert done.stdout == f"{out}: 3 records kept, 5 removed (see {rejected})\n"
    # What cannot be used is one sentence and exit code 2.
    done = subprocess.run([*command, str(out)], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {out}: is there already")


def test_what_cannot_be_protected_is_an_error(files, tmp_path):
    train, test, _ = files
    (tmp_path / "test" / "t.png").unlink()
    with pytest.raises(InputError, match=r"test.jsonl, line 1: image 't.png': no such"):
        main([str(train), "--against", str(test), "--out", str(tmp_path / "clean.jsonl")])
    with pytest.raises(InputError, match="overwrite an input"):
        main([str(train), "--against", str(test), "--out", str(test), "--overwrite"])
    assert not (tmp_path / "clean.jsonl").exists()


@pytest.mark.parametrize(
    "text",
    [
        "### Question:\nQuestion: <image 1> What’s  the\nＡrea?",
        "what s the area",
        "<image>WHAT'S THE AREA...\n\n### Solution Process:\nFirst",
    ],
)
def test_normalised_questions(text):
    assert normalised_question(text) == "what s the area"


def test_questions_without_words_are_not_the_same(tmp_path):
    train = write(tmp_path / "train.jsonl", [training("a", "<image>?", "x.png")])
    Image.new("RGB", (20, 20), "white").save(tmp_path / "x.png")
    Image.new("RGB", (30, 20), "white").save(tmp_path / "y.png")
    test = write(tmp_path / "test.jsonl", [{"question": "<image>!", "image_path": "y.png"}])
    assert run((train, test), tmp_path / "out.jsonl") == (["a"], {})


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
