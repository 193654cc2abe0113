"""The embedded data set and model: formats, truth of the labels, disjoint digits, small size."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from transformers import AutoImageProcessor, AutoTokenizer, InternVLForConditionalGeneration

from data_tools.demo_data import (
    KINDS,
    NUM_ROLLOUTS,
    SOLUTIONS_PER_QUESTION,
    TILE_SIZE,
    make_demo_data,
    noise_auc,
)
from data_tools.demo_model import Pretraining, build_tiny_model, data_texts
from dreamprm_dist.data.schema import parse_meta_record, parse_test_record, parse_training_record
from dreamprm_dist.evaluation.answers import extract_answer
from dreamprm_dist.prm.chat import encode_conversation, label_token_ids
from dreamprm_dist.prm.grid import num_tiles
from dreamprm_dist.prm.solutions import (
    SYSTEM_PROMPT,
    split_steps,
    steps_conversation,
)
from dreamprm_dist.prm.tiling import image_tiles


def read(folder: Path, name: str) -> list[dict]:
    return json.loads((folder / f"{name}.json").read_text())


def digit_index(path: str) -> int:
    return int(re.fullmatch(r"images/digit(\d+)\.png", path)[1])


def true_labels(path: str, question: str, steps: list[str]) -> list[str]:
    """Step labels worked out from the texts and scikit-learn's own targets."""
    digit = int(load_digits().target[digit_index(path)])
    (kind,) = [kind for kind in KINDS if kind.question == question]
    answer = kind.answer(digit)
    right = [f"The digit is {digit}.", kind.inference(answer), f"Answer: {answer}"]
    return ["+" if steps[: i + 1] == right[: i + 1] else "-" for i in range(len(right))]


def parts(record: dict) -> tuple[str, list[str], list[str]]:
    """Question, steps and labels of a training or meta record."""
    system, question, *turns = record["conversations"]
    assert system == {"from": "system", "value": SYSTEM_PROMPT}
    assert [turn["from"] for turn in [question, *turns]] == ["human"] + ["human", "gpt"] * 3
    text = question["value"].removeprefix("### Question:\n")
    return text, [t["value"] for t in turns[::2]], [t["value"] for t in turns[1::2]]


def test_records_are_in_the_projects_formats(tiny_data_dir: Path) -> None:
    for record in read(tiny_data_dir, "train"):
        assert len(parse_training_record(record).images) == 1
    for record in read(tiny_data_dir, "meta"):
        assert parse_meta_record(record).true_false is record["true_false"]
    for record in read(tiny_data_dir, "test"):
        assert len(parse_test_record(record).candidates) == SOLUTIONS_PER_QUESTION


def test_training_labels_are_the_truth_or_its_reverse(tiny_data_dir: Path) -> None:
    train, truth = read(tiny_data_dir, "train"), read(tiny_data_dir, "truth")
    assert len(train) == len(truth) == 64
    assert len({record["id"] for record in train}) == 64
    for record, true in zip(train, truth, strict=True):
        question, steps, labels = parts(record)
        assert true["clean_labels"] == true_labels(record["image"], question, steps)
        reverse = ["+-"[label == "+"] for label in true["clean_labels"]]
        assert labels == (reverse if true["flipped"] else true["clean_labels"])
    assert sum(true["flipped"] for true in truth) == round(0.35 * 64)
    assert {label for true in truth for label in true["clean_labels"]} == {"+", "-"}


def test_counts_are_as_wrong_as_the_labels(tiny_data_dir: Path) -> None:
    train, truth = read(tiny_data_dir, "train"), read(tiny_data_dir, "truth")
    shares: dict[bool, list[float]] = {True: [], False: []}
    for record, true in zip(train, truth, strict=True):
        for turn in record["conversations"]:
            if turn["from"] == "gpt":
                share = turn["num_mc_correct"] / turn["num_mc_total"]
                assert turn["num_mc_total"] == NUM_ROLLOUTS
                assert (0 < share <= 1) if turn["value"] == "+" else share == 0
                if share:
                    shares[true["flipped"]].append(share)
    # Uniform on 1 to 16 with one certain success: a mean of 8.5 of 16, whatever was flipped.
    assert min(map(len, shares.values())) > 20
    for found in shares.values():
        assert np.mean(found) == pytest.approx(8.5 / 16, abs=3 * 0.29 / len(found) ** 0.5)


def test_meta_records_are_clean_and_half_of_a_question_s_four_right(tiny_data_dir: Path) -> None:
    meta = read(tiny_data_dir, "meta")
    answers = Counter((record["id"], record["true_false"]) for record in meta)
    assert len(meta) == 32 and len(answers) == 16 and set(answers.values()) == {2}
    for record in meta:
        question, steps, labels = parts(record)
        assert labels == true_labels(record["image"], question, steps)
        assert record["true_false"] is (labels[-1] == "+")
        assert split_steps(record["response"]) == steps


def test_the_control_s_meta_answers_say_nothing(tiny_data_dir: Path) -> None:
    meta, shuffled = read(tiny_data_dir, "meta"), read(tiny_data_dir, "shuffled_meta")
    pairs = Counter(
        (one["id"], one["true_false"], other["true_false"])
        for one, other in zip(meta, shuffled, strict=True)
    )
    assert len(pairs) == 8 * 4 and set(pairs.values()) == {1}
    for one, other in zip(meta, shuffled, strict=True):
        assert one == other | {"true_false": one["true_false"]}


def test_candidates_are_judged_by_their_answer(tiny_data_dir: Path) -> None:
    test = read(tiny_data_dir, "test")
    assert len(test) == 12
    for record in test:
        assert re.fullmatch(r"digit\d+-q\d+", record["id"])
        assert len(record["candidates"]) == len(record["true_false"]) == 4
        for text, right in zip(record["candidates"], record["true_false"], strict=True):
            assert (extract_answer(text) == record["answer"]) is right
            labels = true_labels(record["image_path"], record["question"], split_steps(text))
            assert (labels[-1] == "+") is right


def test_records_are_laid_out_like_candidates(tiny_data_dir: Path) -> None:
    # A candidate has no labels yet: what stands in its `gpt` turns is no part of the layout.
    def layout(turns: list[dict]) -> list[tuple]:
        return [(t["from"], None if t["from"] == "gpt" else t["value"]) for t in turns]

    for record in read(tiny_data_dir, "meta"):
        question, _, _ = parts(record)
        candidate = steps_conversation(question, split_steps(record["response"]))
        assert layout(candidate) == layout(record["conversations"])


def test_no_digit_serves_two_purposes(tiny_data_dir: Path) -> None:
    split = read(tiny_data_dir, "split")
    train, meta, test = (set(split[name]) for name in ("train", "meta", "test"))
    assert len(train) + len(meta) + len(test) == len(train | meta | test) == 1797
    for name, key, digits in (
        ("train", "image", train),
        ("meta", "image", meta),
        ("test", "image_path", test),
    ):
        assert {digit_index(record[key]) for record in read(tiny_data_dir, name)} <= digits


def test_tiles_are_the_same_in_training_and_evaluation(tiny_data_dir: Path) -> None:
    sizes = Counter()
    for path in (tiny_data_dir / "images").iterdir():
        with Image.open(path) as image:
            sizes[image.size] += 1
            expected = {(TILE_SIZE, TILE_SIZE): 1, (2 * TILE_SIZE, TILE_SIZE): 3}[image.size]
        for max_tiles in (6, 12):
            assert num_tiles(*image.size, max_tiles, TILE_SIZE) == expected
            assert len(image_tiles(path.read_bytes(), max_tiles, TILE_SIZE)) == expected
    # About a tenth are wide, so that a grid and its thumbnail are in use at all.
    assert 0 < sizes[2 * TILE_SIZE, TILE_SIZE] < 0.25 * sizes.total()


def test_a_seed_gives_the_same_files_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        make_demo_data(tmp_path / name, seed=seed, num_train=64, num_meta=32, num_test=12)

    def content(folder: Path) -> dict[str, bytes]:
        files = (path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}

    expected = content(tmp_path / "one")
    assert content(tmp_path / "same") == expected
    assert content(tmp_path / "other")["train.json"] != expected["train.json"]


@pytest.mark.parametrize("counts", [{"num_meta": 30}, {"num_test": 0}, {"num_test": 10_000}])
def test_impossible_counts_are_refused(tmp_path: Path, counts: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        make_demo_data(tmp_path, **counts)


def test_default_size_leaves_room_for_best_of_four(tmp_path: Path) -> None:
    figures = make_demo_data(tmp_path, seed=0)
    assert figures["flipped"] == 0.35
    # 720 questions: two standard errors are 3.2 and 3.5 points, around 25 % and 68 %.
    assert 0.21 < figures["first_candidate"] < 0.30
    assert 0.64 < figures["oracle"] < 0.73


def test_noise_auc_is_of_clean_over_flipped(tmp_path: Path) -> None:
    flipped = [True, False, False, True]
    (tmp_path / "truth.json").write_text(json.dumps([{"flipped": f} for f in flipped]))
    assert noise_auc(tmp_path, [0.1, 0.9, 0.8, 0.2]) == 1
    # Of the four pairs of a clean and a flipped one, three in order and one not.
    assert noise_auc(tmp_path, [0.1, 0.3, 0.8, 0.5]) == 0.75


def test_model_folder_loads_again(tiny_prm_dir: Path) -> None:
    model = InternVLForConditionalGeneration.from_pretrained(tiny_prm_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny_prm_dir)
    processor = AutoImageProcessor.from_pretrained(tiny_prm_dir)
    assert type(processor).__name__ == "GotOcr2ImageProcessorPil"  # needs no torchvision
    assert 200_000 < sum(p.numel() for p in model.parameters()) < 1_200_000
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    assert len(tokenizer) <= model.config.text_config.vocab_size
    message = [{"role": "user", "content": "3"}]
    assert tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>user\n3<|im_end|>\n<|im_start|>assistant\n"
    )


def test_tokenizer_is_short_on_demo_texts_and_reads_any_other(
    tiny_prm_dir: Path, tiny_data_dir: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_prm_dir)
    assert len(set(label_token_ids(tokenizer).values())) == 2
    assert len(tokenizer.encode(SYSTEM_PROMPT, add_special_tokens=False)) == 1
    other = "Größe 42+1 - ok?\n"
    assert tokenizer.decode(tokenizer.encode(other, add_special_tokens=False)) == other
    for record in read(tiny_data_dir, "train"):
        encoded = encode_conversation(record["conversations"], tokenizer, 1, tokens_per_tile=16)
        assert len(encoded.input_ids) <= 60 and len(encoded.step_positions) == 3


def test_a_few_steps_of_pretraining_lower_the_loss(tiny_data_dir: Path) -> None:
    model, tokenizer = build_tiny_model(data_texts(tiny_data_dir), seed=1)
    pretraining = Pretraining(model, tokenizer, list(range(64)), seed=1)
    batch = pretraining.batch(range(32), False, (0.4, 0.3, 0.2, 0.1))
    with torch.no_grad():
        before = float(pretraining.verification_loss(batch))
    pretraining.train(20, verify=False)
    pretraining.train(20, verify=True)
    with torch.no_grad():
        assert float(pretraining.verification_loss(batch)) < before
    assert set(pretraining.accuracy()) == {"digits", "steps"}
