"""The demo's base model: a tiny InternVL that can see digits and verify steps, far from perfectly.

    python -m data_tools.demo_model --data DIR --out DIR/base --seed S

makes the model (the classes of the real one), its tokenizer and image processor, and pretrains it
on fresh, clean questions about the training and meta digits of the data set in DIR.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from data_tools.demo_data import KINDS, TILE_SIZE, conversation, digit_image, make_solution
from dreamprm_dist.prm.chat import (
    IMAGE_CONTEXT,
    IMAGE_END,
    IMAGE_START,
    ROLES,
    TURN_END,
    TURN_START,
    encode_conversation,
)
from dreamprm_dist.prm.tiling import IMAGENET_MEAN, IMAGENET_STD, image_tiles
from dreamprm_dist.solutions import SYSTEM_PROMPT

PAD = "<|endoftext|>"
SPECIAL_TOKENS = [PAD, TURN_START, TURN_END, IMAGE_START, IMAGE_END, IMAGE_CONTEXT]
VOCAB_SIZE = 512
PATCH_SIZE = 4
DOWNSAMPLE_RATIO = 0.5
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the real one's special tokens, trained on turns' texts.

    It reads any text, but is made to write the demo's in very few tokens: merges cross words, so
    that a turn becomes `<|im_start|>`, `user\\nThe digit is `, `7`, `.`, `<|im_end|>`, and the
    system prompt, 944 characters before every question, is one (ordinary) added token. Digits, `+`
    and `-` never merge.
    """
    turns = sorted(set(texts) - {SYSTEM_PROMPT})
    words = [f"{role}\n" for role in ROLES.values()] + ["\n"]
    words += [prefix + text for text in turns for prefix in ("", f"{ROLES['human']}\n")]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("[0-9+-]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 1,
        min_frequency=1,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(words, trainer)
    tokenizer.add_tokens([AddedToken(SYSTEM_PROMPT, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=TURN_END,
        additional_special_tokens=SPECIAL_TOKENS,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def tiny_config(tokenizer: PreTrainedTokenizerFast) -> InternVLConfig:
    """The real model's configuration, 0.6 M parameters small: 32 px tiles, 16 tokens a tile."""
    text = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    vision = InternVLVisionConfig(
        image_size=TILE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        attention_bias=True,
        initializer_range=0.05,
        layer_scale_init_value=1.0,
    )
    return InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT),
        image_seq_length=int((TILE_SIZE / PATCH_SIZE * DOWNSAMPLE_RATIO) ** 2),
        downsample_ratio=DOWNSAMPLE_RATIO,
        tie_word_embeddings=True,  # here, not in the text config, is where InternVL ties them
    )


def build_tiny_model(
    texts: Iterable[str], seed: int = 0
) -> tuple[InternVLForConditionalGeneration, PreTrainedTokenizerFast]:
    """A tiny InternVL with random weights and a tokenizer trained on `texts`."""
    tokenizer = train_tokenizer(texts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = InternVLForConditionalGeneration(tiny_config(tokenizer))
    return model.eval(), tokenizer


def save_model(
    model: InternVLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, out: Path | str
) -> None:
    """Write a folder that `from_pretrained` reads, without torchvision."""
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    GotOcr2ImageProcessorPil(
        size={"height": TILE_SIZE, "width": TILE_SIZE},
        crop_to_patches=True,
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
    ).save_pretrained(out)


def make_tiny_model(out: Path | str, texts: Iterable[str], seed: int = 0) -> Path:
    """Write a tiny InternVL with random weights; see `build_tiny_model`.

    Args:
        out: folder to write to.
        texts: turns' texts for the tokenizer.

    Returns:
        `out`, as a Path.
    """
    save_model(*build_tiny_model(texts, seed), out)
    return Path(out)


def data_texts(data: Path | str) -> list[str]:
    """The texts of all turns of the training records in a demo data set."""
    records = json.loads((Path(data) / "train.json").read_text())
    return [turn["value"] for record in records for turn in record["conversations"]]


class Pretraining:
    """Teaches a tiny model to read digits, then to verify solutions about them.

    Everything is cached: tiles once a digit, tokens once a text. Batches hold images of one size,
    so there is next to no padding; the causal model needs no mask for what is padded on the right.

    Args:
        model: trained in place.
        tokenizer: the model's.
        digits: indices of the digits to train on.
        seed: of batches, solutions and shifts.
    """

    def __init__(
        self,
        model: InternVLForConditionalGeneration,
        tokenizer: PreTrainedTokenizerFast,
        digits: list[int],
        seed: int = 0,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.rng = np.random.default_rng(seed)
        self.tiles = {wide: digit_tiles(digits, wide) for wide in (False, True)}
        self.values = load_digits().target[digits].tolist()
        self.encode = lru_cache(maxsize=None)(self._encode)
        # The token after which a solution names the digit it sees, and the digits' tokens.
        _, self.naming = tokenizer.encode(f"{TURN_START}{ROLES['human']}\nThe digit is ")
        self.digit_ids = torch.tensor(tokenizer.convert_tokens_to_ids([str(d) for d in range(10)]))

    def _encode(self, kind: int, steps: tuple, right: tuple, tiles: int) -> tuple:
        labels = ["-+"[r] for r in right]
        turns = conversation(KINDS[kind].question, steps, labels)
        # Neutral labels in the context: with the real ones there it learns to copy them.
        encoded = encode_conversation(
            turns, self.tokenizer, tiles, self.model.config.image_seq_length, label_context="plus"
        )
        ids = torch.tensor(encoded.input_ids)
        naming = encoded.input_ids.index(self.naming)
        return ids, naming, encoded.step_positions, encoded.step_targets

    def batch(self, rows: list[int], wide: bool, errors: tuple[float, ...]) -> dict:
        """One fresh solution a digit.

        Returns:
            `pixels`, `ids` (B, L), `naming` (B,), `digits` (B,) and `steps`, `targets` (B, 3).
        """
        pixels = self.tiles[wide][rows]
        encoded = []
        for row in rows:
            kind = int(self.rng.integers(len(KINDS)))
            solution = make_solution(KINDS[kind], self.values[row], errors, self.rng)
            encoded.append(self.encode(kind, solution.steps, solution.right, pixels.shape[1]))
        ids, naming, steps, targets = zip(*encoded, strict=True)
        pad = self.tokenizer.pad_token_id
        return {
            "pixels": pixels.flatten(0, 1),
            "ids": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad),
            "naming": torch.tensor(naming),
            "digits": torch.tensor([self.values[row] for row in rows]),
            "steps": torch.tensor(steps),
            "targets": torch.tensor(targets),
        }
