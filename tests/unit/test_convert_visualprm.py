"""VisualPRM400K as it is published: its images, questions and missing ids."""

import pytest
from json_lines import lines, write
from PIL import Image

from data_tools.convert import main
from data_tools.shard import shard_file
from dreamprm_dist.data.schema import parse_training_record
from dreamprm_dist.errors import InputError

STEP = {"step": "It is.", "score": 0.5, "num_mc_correct": 8, "num_mc_total": 16}


def raw(image=None, **fields):
    return {"question": "How many?", "image": image, "steps_with_score": [STEP], **fields}


def conversation(image=None, label="+", **fields):
    turns = [{"from": "human", "value": "### Question:\nQ"}, {"from": "gpt", "value": label}]
    return {"id": -1, "image": image, "conversations": turns, **fields}


def png(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 8), "red").save(path)


@pytest.fixture
def root(tmp_path):
    """A folder as the archives unpack: annotations beside images."""
    for path in ("ai2d/0.png", "nlvr2/images/train-1.png", "geo/images/2.png", "a b/é.png"):
        png(tmp_path / "prm" / "images" / path)
    return tmp_path / "prm"


@pytest.mark.parametrize("command", ["raw", "conversations", "reference"])
def test_images_are_found_where_the_archive_has_them(root, tmp_path, command, capsys):
    png(root / "VisualPRM400K-v1.1-Raw" / "as" / "written.png")
    png(root / "images" / "as" / "written.png")  # not this one
    png(root / "images" / "train-7.png")
    png(root / "images" / "nlvr2" / "images" / "train-7.png")  # nor this
    at = {
        "VisualPRM400K-v1.1-Raw/ai2d/0.png": "images/ai2d/0.png",
        "VisualPRM400K-v1.1-Raw/geo/images/2.png": "images/geo/images/2.png",
        "VisualPRM400K-v1.1-Raw/a b/é.png": "images/a b/é.png",
        "VisualPRM400K-v1.1/ai2d/0.png": "images/ai2d/0.png",
        "images/train-1.png": "images/nlvr2/images/train-1.png",
        "images/ai2d/0.png": "images/ai2d/0.png",
        "VisualPRM400K-v1.1-Raw/as/written.png": "VisualPRM400K-v1.1-Raw/as/written.png",
        "images/train-7.png": "images/train-7.png",
    }
    missing = ["VisualPRM400K-v1.1-Raw/ai2d/1.png", "images/train-2.png", "ai2d/0.png", "images/"]
    make = raw if command == "raw" else conversation
    both = ["VisualPRM400K-v1.1-Raw/ai2d/0.png", "images/train-1.png"]
    records = [make(image) for image in [*at, both, *missing]]
    source = write(root / "annotations" / "ai2d.jsonl", records)
    out = tmp_path / "out" / "train.jsonl"
    kind = ["--kind", "training"] if command == "reference" else []
    main([command, str(source), "--image_root", str(root), "--out", str(out), *kind])
    expected = [*at.values(), [at[image] for image in both]]
    written = [record["image"] for record in lines(out)]
    assert written[:-1] == [f"../prm/{path}" for path in expected[:-1]]
    assert written[-1] == [f"../prm/{path}" for path in expected[-1]]
    rejected = lines(tmp_path / "out" / "train.rejected.jsonl")
    assert [entry["id"] for entry in rejected] == [f"ai2d.jsonl:{i}" for i in range(10, 14)]
    assert all("--image_root" in entry["reason"] for entry in rejected)
    assert (
        capsys.readouterr()
        .out.strip()
        .endswith(
            "5 images found at images/… for VisualPRM400K…/…, "
            "2 images found at images/nlvr2/images/… for images/…"
        )
    )
    assert shard_file(out, tmp_path / "shards", "training", 2)["num_rejected"] == 0


def test_without_the_image_check_what_is_found_is_found(root, tmp_path):
    images = ["VisualPRM400K-v1.1-Raw/ai2d/0.png", "VisualPRM400K-v1.1-Raw/ai2d/9.png"]
    source = write(root / "ai2d.jsonl", map(raw, images))
    out = tmp_path / "prm" / "out.jsonl"
    main(["raw", str(source), "--out", str(out), "--no_image_check"])
    assert [record["image"] for record in lines(out)] == ["images/ai2d/0.png", images[1]]


def test_a_record_without_an_id_is_named_by_its_place(tmp_path):
    ids = [-1, "-1", "", None, 0, "q", 7]
    records = [conversation(id=i) for i in ids]
    del records[3]["id"]
    expected = [*(f"a.jsonl:{line}" for line in range(1, 5)), 0, "q", 7]
    source = write(tmp_path / "deep" / "a.jsonl", records)
    for command in (["conversations"], ["reference", "--kind", "training"]):
        main([*command, str(source), "--out", str(tmp_path / "out.jsonl"), "--overwrite"])
        assert [record["id"] for record in lines(tmp_path / "out.jsonl")] == expected
    # Meta records without an id belong together by image and question.
    meta = write(tmp_path / "meta.jsonl", [{**conversation(), "true_false": True}])
    main(["reference", "--kind", "meta", str(meta), "--out", str(tmp_path / "m.jsonl")])
    assert [record["id"] for record in lines(tmp_path / "m.jsonl")] == [-1]


def test_the_place_of_an_entry_of_a_json_list_and_of_a_rejected_record(tmp_path):
    source = tmp_path / "b.json"
    source.write_text(
        '[{"conversations": 1}, {"conversations": [{"from": "human", "value": "Q"}, '
        '{"from": "gpt", "value": "+"}]}, {"id": -1, "steps_with_score": []}]'
    )
    main(["conversations", str(source), "--out", str(tmp_path / "out.jsonl")])
    assert lines(tmp_path / "out.jsonl")[0]["id"] == "b.json:2"
    rejected = lines(tmp_path / "out.rejected.jsonl")
    assert [entry["id"] for entry in rejected] == ["b.json:1", "b.json:3"]


def test_the_bare_question_stays_beside_the_prompt(tmp_path):
    records = [
        raw(question="Your task is to say how many.", question_orig="How many?"),
        raw(),
        raw(question_orig=None),
    ]
    source = write(tmp_path / "a.jsonl", records)
    main(["raw", str(source), "--out", str(tmp_path / "out.jsonl")])
    first, *others = lines(tmp_path / "out.jsonl")
    assert first["question_orig"] == "How many?"
    assert first["conversations"][1]["value"].startswith("### Question:\nYour task is to say how")
    assert not any("question_orig" in record for record in others)
    assert parse_training_record(first).source_id == "a.jsonl:1"


@pytest.mark.parametrize("command", ["raw", "conversations"])
def test_records_without_any_label_are_counted(tmp_path, capsys, command):
    unvisited = {**STEP, "score": 0.0, "num_mc_correct": 0, "num_mc_total": 0}
    if command == "raw":
        records = [raw(), raw(steps_with_score=[unvisited] * 2), raw(steps_with_score=[unvisited])]
        records.append(raw(steps_with_score=[STEP, unvisited]))
    else:
        records = [conversation(label=label) for label in ("+", None, None, "-")]
    source = write(tmp_path / "a.jsonl", records)
    out = tmp_path / "out.jsonl"
    main([command, str(source), "--out", str(out)])
    assert capsys.readouterr().out == (
        f"{out}: 4 records, 0 rejected, 2 without any label, of no use to training\n"
    )
    meta = [{**conversation(label=None), "true_false": True}]
    source = write(tmp_path / "meta.jsonl", meta)
    main(["reference", "--kind", "meta", str(source), "--out", str(out), "--overwrite"])
    assert capsys.readouterr().out == f"{out}: 1 records, 0 rejected\n"


def test_the_first_records_of_each_file(tmp_path):
    sources = [write(tmp_path / f"{name}.jsonl", [raw(id=i) for i in range(5)]) for name in "ab"]
    out = tmp_path / "out.jsonl"
    main(["raw", *map(str, sources), "--out", str(out), "--limit", "2"])
    assert [(r["dataset"], r["id"]) for r in lines(out)] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    for wrong in ("0", "-1", "x"):
        with pytest.raises(InputError, match=f"--limit: must be 1 or more, not {wrong}"):
            main(["raw", str(sources[0]), "--out", str(out), "--overwrite", "--limit", wrong])
