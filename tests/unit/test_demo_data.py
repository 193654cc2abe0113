"""The embedded data set and its tiny model are what the demo says of them."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from transformers import AutoImageProcessor, AutoTokenizer, InternVLForConditionalGeneration

from data_tools.demo_data import KINDS, SOLUTIONS_PER_QUESTION, TILE_SIZE, make_demo_data
from data_tools.demo_model import Pretraining, build_tiny_model, data_texts
from dreamprm_dist.data.schema import parse_meta_record, parse_test_record, parse_training_record
from dreamprm_dist.prm.chat import label_token_ids
from dreamprm_dist.prm.tiling import num_tiles, tile_grid
from dreamprm_dist.solutions import candidate_conversation, extract_answer


def load(folder: Path, name: str):
    return json.loads((folder / f"{name}.json").read_text())


def labels(record: dict) -> list[str]:
    return [turn["value"] for turn in record["conversations"] if turn["from"] == "gpt"]


def test_records_are_in_the_projects_formats(tiny_data_dir: Path):
    for record in load(tiny_data_dir, "train"):
        assert len(parse_training_record(record).images) == 1
    for record in load(tiny_data_dir, "meta"):
        meta = parse_meta_record(record)
        assert meta.true_false == (labels(record)[-1] == "+")
    for record in load(tiny_data_dir, "test"):
        assert len(parse_test_record(record).candidates) == SOLUTIONS_PER_QUESTION


def test_a_flipped_instance_has_every_label_flipped(tiny_data_dir: Path):
    truth = load(tiny_data_dir, "truth")
    for record, fact in zip(load(tiny_data_dir, "train"), truth, strict=True):
        turned = {"+": "-", "-": "+"} if fact["flipped"] else {"+": "+", "-": "-"}
        assert labels(record) == [turned[label] for label in fact["clean_labels"]]
    assert sum(fact["flipped"] for fact in truth) == round(0.35 * len(truth))


def test_no_test_digit_is_trained_on(tiny_data_dir: Path):
    def images(name, key):
        return {record[key] for record in load(tiny_data_dir, name)}

    test = images("test", "image_path")
    train, meta = images("train", "image"), images("meta", "image")
    assert not test & train and not test & meta and not train & meta
    split = load(tiny_data_dir, "split")
    assert sorted(sum(split.values(), [])) == list(range(1797))


def test_answers_are_true_or_false_as_said(tiny_data_dir: Path):
    for record in load(tiny_data_dir, "test"):
        for candidate, right in zip(record["candidates"], record["true_false"], strict=True):
            assert (extract_answer(candidate) == record["answer"]) == right


def test_labels_follow_from_the_digit(tiny_data_dir: Path):
    """Worked out again from the image's digit and the steps' text."""
    digits = load_digits().target
    for record in load(tiny_data_dir, "meta"):
        digit = int(digits[int(record["image"].removeprefix("images/digit")[:-4])])
        kind = next(kind for kind in KINDS if kind.name == record["dataset"])
        seen, inferred, answered = (
            turn["value"] for turn in record["conversations"][2:] if turn["from"] == "human"
        )
        right = [seen == f"The digit is {digit}."]
        right.append(right[0] and inferred == kind.inference(kind.answer(digit)))
        right.append(right[1] and answered == f"Answer: {kind.answer(digit)}")
        assert labels(record) == ["+" if r else "-" for r in right]


def test_the_layout_is_that_of_candidates(tiny_data_dir: Path):
    for record in load(tiny_data_dir, "meta"):
        question = record["conversations"][1]["value"].removeprefix("### Question:\n")
        asked = candidate_conversation(question, record["response"])
        assert [t for t in asked if t["from"] != "gpt"] == [
            t for t in record["conversations"] if t["from"] != "gpt"
        ]


def test_the_same_seed_gives_the_same_files(tmp_path: Path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_demo_data(tmp_path / name, seed, num_train=20, num_meta=8, num_test=4)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.*"))
    assert all(
        (tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files
    )
    assert load(tmp_path / "a", "train") != load(tmp_path / "c", "train")


@pytest.mark.parametrize("max_tiles", [6, 12])
def test_wide_images_are_tiled(tiny_data_dir: Path, max_tiles: int):
    sizes = {Image.open(path).size for path in (tiny_data_dir / "images").iterdir()}
    assert sizes == {(32, 32), (64, 32)}
    assert tile_grid(64, 32, max_tiles, TILE_SIZE) == (2, 1)
    assert num_tiles(64, 32, max_tiles, TILE_SIZE) == 3
    assert num_tiles(32, 32, max_tiles, TILE_SIZE) == 1


def test_the_model_folder_loads_as_any_other(tiny_prm_dir: Path):
    model = InternVLForConditionalGeneration.from_pretrained(tiny_prm_dir)
    assert 0.3e6 < sum(p.numel() for p in model.parameters()) < 1e6
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    tokenizer = AutoTokenizer.from_pretrained(tiny_prm_dir)
    assert len(set(label_token_ids(tokenizer).values())) == 2
    text = "Any text: ü, 12, a+b.\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert AutoImageProcessor.from_pretrained(tiny_prm_dir, backend="pil")


def test_a_few_steps_of_pretraining_lower_both_losses(tiny_data_dir: Path):
    model, tokenizer = build_tiny_model(data_texts(tiny_data_dir), seed=1)
    pretraining = Pretraining(model, tokenizer, list(range(64)), seed=1)
    batch = pretraining.batch(range(32), False, (0.4, 0.3, 0.2, 0.1))
    losses = (pretraining.language_loss, pretraining.verification_loss)
    with torch.no_grad():
        before = [float(loss(batch)) for loss in losses]
    pretraining.train(20, verify=False)
    pretraining.train(20, verify=True)
    with torch.no_grad():
        after = [float(loss(batch)) for loss in losses]
    assert after[1] < before[1]
    assert set(pretraining.accuracy()) == {"digits", "steps"}
