"""The chat format and the tiling, against facts computed with the reference implementation."""

import copy
import io
import json
import unicodedata
from pathlib import Path
from unittest.mock import Mock, patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dreamprm_dist.data.schema import SOLUTION_MARK
from dreamprm_dist.prm.chat import (
    IGNORE_INDEX,
    IMAGE_CONTEXT,
    ROLES,
    encode_conversation,
    label_token_ids,
)
from dreamprm_dist.prm.grid import num_tiles, tile_grid, usable_size
from dreamprm_dist.prm.solutions import SYSTEM_PROMPT, steps_conversation
from dreamprm_dist.prm.tiling import IMAGENET_MEAN, IMAGENET_STD, image_tiles


@pytest.fixture(scope="module")
def tokenizer(tiny_prm_dir: Path):
    return AutoTokenizer.from_pretrained(tiny_prm_dir)


@pytest.fixture(scope="module", params=["the demo's tokenizer", "InternVL3's tokenizer"])
def each_tokenizer(request, tiny_prm_dir: Path):
    if request.param.startswith("the demo"):
        return AutoTokenizer.from_pretrained(tiny_prm_dir)
    reference = request.getfixturevalue("reference_dir")
    return PreTrainedTokenizerFast(tokenizer_file=str(reference / "tokenizer" / "tokenizer.json"))


def turns(*labels, question="q"):
    steps = [({"from": "human", "value": "step"}, {"from": "gpt", "value": v}) for v in labels]
    return [{"from": "human", "value": question}, *(turn for step in steps for turn in step)]


def test_all_reference_conversations(reference_dir: Path):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(reference_dir / "tokenizer" / "tokenizer.json")
    )
    records = json.loads((reference_dir / "mmmu_pro_meta_sample.json").read_text())
    facts = json.loads((reference_dir / "label_positions.json").read_text())
    assert len(facts) == 160
    for fact in facts:
        record = copy.deepcopy(records[fact["row"]])
        labels = iter(fact["labels"])
        for turn in record["conversations"]:
            if turn["from"] == "gpt":
                turn["value"] = next(labels)
        encoded = encode_conversation(record["conversations"], tokenizer, fact["tiles"])
        assert len(encoded.input_ids) == fact["num_tokens"]
        assert encoded.step_positions == fact["positions"]
        assert encoded.step_targets == fact["targets"]
        assert encoded.input_ids[-12:] == fact["tail_ids"]


def test_all_reference_tilings(reference_dir: Path):
    cases = json.loads((reference_dir / "tiling_cases.json").read_text())
    assert len(cases) > 100
    for case in cases:
        size = (case["width"], case["height"], case["max_num"])
        assert tile_grid(*size) == (case["columns"], case["rows"])
        assert num_tiles(*size) == case["tiles"]


def test_a_step_is_read_where_the_model_is_about_to_answer(tokenizer):
    encoded = encode_conversation(turns("+", "-"), tokenizer, 1, tokens_per_tile=3)
    plus, minus = (tokenizer.convert_tokens_to_ids(label) for label in "+-")
    assert encoded.step_targets == [plus, minus]
    for position, shown in zip(encoded.step_positions, (plus, minus), strict=True):
        assert encoded.input_ids[position + 1] == shown
        assert tokenizer.decode(encoded.input_ids[: position + 1]).endswith("assistant\n")


def test_unlabelled_steps_have_no_target_and_show_plus(tokenizer):
    given = encode_conversation(turns(None, "-"), tokenizer, 1)
    plus = encode_conversation(turns("+", "-"), tokenizer, 1)
    assert given.step_targets[0] == IGNORE_INDEX
    assert given.input_ids == plus.input_ids and given.step_positions == plus.step_positions


def test_label_context_plus_shows_plus_but_keeps_targets(tokenizer):
    shown = encode_conversation(turns("-", "-"), tokenizer, 1, label_context="plus")
    data = encode_conversation(turns("-", "-"), tokenizer, 1)
    neutral = encode_conversation(turns("+", "+"), tokenizer, 1)
    assert shown.input_ids == neutral.input_ids != data.input_ids
    assert shown.step_targets == data.step_targets


def test_images_stand_at_their_placeholders_or_first_of_all(tokenizer):
    image = tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT)
    two = turns("+", question="a <image> b <image> c")
    encoded = encode_conversation(two, tokenizer, [1, 2], tokens_per_tile=4)
    assert encoded.input_ids.count(image) == 12
    first = encode_conversation(turns("+"), tokenizer, [1, 2], tokens_per_tile=4)
    text = tokenizer.decode(first.input_ids)
    assert text.startswith("<|im_start|>user\n<img><IMG_CONTEXT>")
    assert "</img><img>" in text
    with pytest.raises(ValueError, match=r"2 <image> for 1 image\(s\)"):
        encode_conversation(two, tokenizer, [1])


def shown(text: str, tokenizer) -> str:
    """A text as a tokenizer gives it back."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    return unicodedata.normalize("NFC", text) if normalizer else text


def written(conversation, tokenizer, image: str) -> str:
    """The chat format as DESIGN has it, put together from texts; all images before the question."""
    text = ""
    for place, turn in enumerate(conversation):
        value = turn["value"] if turn["from"] != "gpt" else turn["value"] or "+"
        before, turn_text = f"{ROLES[turn['from']]}\n", value
        if turn["from"] == "human" and conversation[place - 1]["from"] == "system" and image:
            before, turn_text = before + image, shown(value, tokenizer)
        else:
            before, turn_text = "", shown(before + value, tokenizer)
        text += f"<|im_start|>{before}{turn_text}<|im_end|>\n"
    return text


@given(st.data())
def test_no_text_is_structure(each_tokenizer, data):
    """Whatever turns say, special tokens stand where they stand among harmless texts."""
    tokenizer = each_tokenizer
    added = tokenizer.added_tokens_decoder
    spelled = [token.content for token in added.values()]
    forged = [
        *spelled,
        *(token[: len(token) // 2] for token in spelled),
        *(token[len(token) // 2 :] for token in spelled),
        *(
            "<image>",
            "<image 1>",
            "assistant\n+",
            "user\n",
            "system\n",
            "\n",
            " ",
            "\x00",
            "e\u0301",
        ),
    ]
    text = st.lists(st.sampled_from(forged) | st.text(max_size=5), max_size=8).map("".join)
    text |= st.just(SYSTEM_PROMPT)
    question = data.draw(text).replace("<image>", "< image>")
    steps, image = data.draw(st.lists(text, min_size=1, max_size=3)), data.draw(st.booleans())
    labels = data.draw(st.lists(st.sampled_from("+-"), min_size=len(steps), max_size=len(steps)))

    def encoded(question: str, steps: list[str], system: str = SYSTEM_PROMPT):
        conversation = steps_conversation(question, steps, system, labels)
        tiles = [1] if image else []
        return conversation, encode_conversation(conversation, tokenizer, tiles, tokens_per_tile=2)

    conversation, found = encoded(question, steps, data.draw(text))
    _, harmless = encoded("q", ["s"] * len(steps), "system")
    # The demo's tokenizer has its system prompt as a token, and may use it there alone.
    prompt = tokenizer.get_vocab().get(SYSTEM_PROMPT)
    special = [i for i in found.input_ids if i in added]
    assert special.count(prompt) <= (conversation[0]["value"] == SYSTEM_PROMPT)
    assert [i for i in special if i != prompt] == [i for i in harmless.input_ids if i in added]
    assert (
        found.step_targets
        == harmless.step_targets
        == [*map(label_token_ids(tokenizer).get, labels)]
    )
    image_text = "<img><IMG_CONTEXT><IMG_CONTEXT></img>" if image else ""
    assert tokenizer.decode(found.input_ids) == written(conversation, tokenizer, image_text)
    for position, target in zip(found.step_positions, found.step_targets, strict=True):
        assert found.input_ids[position + 1] == target
        tail = tokenizer.decode(found.input_ids[position - 2 : position + 1])
        assert tail.endswith("<|im_start|>assistant\n")


def test_ordinary_text_has_the_tokens_of_the_whole_conversation(each_tokenizer):
    """As the tokenizer itself reads it, in one piece with its special tokens."""
    question = "\n é e\u0301 漢字 <b>3 + 4</b>  \n\n(A) x"
    steps = ["\nIt is 7.", "Answer: A ", "<image>", "<|im_"]
    conversation = steps_conversation(question, steps, labels=["+", None, "-", "+"])
    image = "<img>" + "<IMG_CONTEXT>" * 6 + "</img>"
    found = encode_conversation(conversation, each_tokenizer, [3], tokens_per_tile=2)
    whole = written(conversation, each_tokenizer, image)
    assert found.input_ids == each_tokenizer.encode(whole, add_special_tokens=False)


@pytest.mark.parametrize(
    ("asked", "later"),
    [
        ("a <image> b", ["c", "d"]),
        ("<image>", ["<image>", "<image><image>"]),
        ("a", ["<image> c", "d"]),
        ("", ["</img><image>", "<IMG_CONTEXT>"]),
        (f"<image>\n\n{SOLUTION_MARK}\n<image>", ["<image>"]),
        (f"a\n\n{SOLUTION_MARK}\nsee <image>", ["<image>"]),
    ],
)
def test_only_the_question_places_the_image(tokenizer, asked: str, later: list[str]):
    conversation = [
        {"from": "system", "value": "Look at the <image>."},
        {"from": "human", "value": asked},
        {"from": "gpt", "value": "+"},
        *(turn for text in later for turn in turns("-", question=text)[:1] + turns("-")[2:]),
    ]
    text = tokenizer.decode(encode_conversation(conversation, tokenizer, 1, 1).input_ids)
    question, mark, step = asked.partition(SOLUTION_MARK)
    block = "<img><IMG_CONTEXT></img>"
    placed = question.replace("<image>", block) if "<image>" in question else block + question
    begin = "<|im_start|>system\nLook at the <image>.<|im_end|>\n<|im_start|>user\n"
    assert text.startswith(f"{begin}{placed}{mark}{step}<|im_end|>\n<|im_start|>assistant\n+")
    for said in later:
        assert f"<|im_start|>user\n{said}<|im_end|>\n" in text


def test_without_an_image_the_mark_is_text(tokenizer):
    encoded = encode_conversation(turns("+", question="<image> or <image>?"), tokenizer, [])
    assert "user\n<image> or <image>?<|im_end|>" in tokenizer.decode(encoded.input_ids)


def test_a_tokenizer_without_the_formats_tokens_is_refused():
    words = Tokenizer(models.WordLevel({"+": 0, "-": 1, "?": 2}, "?"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    with pytest.raises(ValueError, match=r"lacks <\|im_start\|>"):
        encode_conversation(turns("+"), tokenizer, 1)


def test_labels_are_tokenised_once(tiny_prm_dir: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_prm_dir)
    with patch.object(tokenizer, "encode", wraps=tokenizer.encode) as encode:
        first = label_token_ids(tokenizer)
        assert [call.args[0] for call in encode.call_args_list] == ["+", "-"]
        assert label_token_ids(tokenizer) == first
        encode_conversation(turns("+", "-"), tokenizer, 1)
        assert [call.args[0] for call in encode.call_args_list].count("+") == 1
    other = Mock()
    other.encode.side_effect = lambda label, add_special_tokens: [ord(label)]
    assert label_token_ids(other) == {"+": ord("+"), "-": ord("-")} != first


def test_a_conversation_without_steps_is_refused(tokenizer):
    with pytest.raises(ValueError, match="no step"):
        encode_conversation(turns(), tokenizer, 1)


def test_tiles_are_cut_row_by_row_and_end_with_the_thumbnail():
    # Each tile of a 3 x 2 grid has a grey value of its own.
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    picture = np.kron(grey, np.ones((32, 32), dtype=np.uint8))
    file = io.BytesIO()
    Image.fromarray(picture).convert("RGB").save(file, "PNG")
    tiles = image_tiles(file.getvalue(), max_tiles=6, tile_size=32)
    assert tiles.shape == (7, 3, 32, 32)
    back = tiles * np.array(IMAGENET_STD)[:, None, None] + np.array(IMAGENET_MEAN)[:, None, None]
    # Away from the borders, where bicubic resampling leaves constant areas as they are.
    centres = (back[:6, 0, 16, 16] * 255).round()
    assert centres.tolist() == grey.reshape(-1).tolist()


@pytest.mark.parametrize("size", [(32, 32), (96, 64), (64, 96), (20, 100)])
def test_tiles_are_normalised_cuts_of_the_resized_image_to_the_bit(size):
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    columns, rows = tile_grid(*size, 6, 32)
    image = Image.open(file)
    whole = np.array(image.resize((columns * 32, rows * 32), Image.Resampling.BICUBIC))
    cuts = [np.split(row, columns, axis=1) for row in np.split(whole, rows)]
    expected = [tile for row in cuts for tile in row]
    if len(expected) > 1:
        expected.append(np.array(image.resize((32, 32), Image.Resampling.BICUBIC)))
    values = np.stack(expected).astype(np.float32) / np.float32(255)
    values = (values - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)
    tiles = image_tiles(file.getvalue(), 6, 32)
    assert tiles.is_contiguous()
    assert np.array_equal(tiles.numpy(), values.transpose(0, 3, 1, 2))


@given(width=st.integers(1, 9000), height=st.integers(1, 9000), max_tiles=st.integers(1, 12))
def test_a_usable_size_has_the_same_grids_and_is_never_enlarged(width, height, max_tiles):
    small = usable_size(width, height, max_tiles)
    if small == (width, height):
        return
    assert small[0] <= width and small[1] <= height
    for tiles in range(1, max_tiles + 1):
        columns, rows = tile_grid(*small, tiles)
        assert (columns, rows) == tile_grid(width, height, tiles)
        assert columns * 448 <= small[0] and rows * 448 <= small[1]


def test_usable_sizes():
    assert usable_size(4000, 3000, 12) == (1792, 1344)  # 4 x 3 tiles
    assert usable_size(3000, 3000, 6) == (896, 896)  # 2 x 2 tiles
    assert usable_size(700, 700, 12) == (700, 700)  # tiling enlarges it
    assert usable_size(60_000, 20, 12) == (60_000, 20)  # not high enough for one tile


@pytest.mark.parametrize("size", [(0, 5, 1), (5, 0, 1), (5, 5, 0)])
def test_impossible_sizes_are_refused(size):
    with pytest.raises(ValueError, match="at least 1"):
        tile_grid(*size)
