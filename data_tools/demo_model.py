"""The demo's base model: a tiny InternVL that can see digits and verify steps, not perfectly.

    python -m data_tools.demo_model --data DIR --out DIR/base --seed S

makes the model (the classes of the real one), its tokenizer and image processor, and pretrains it
on fresh, clean questions about the training and meta digits of the data set in DIR.
"""

import argparse
import io
import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import trange
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from data_tools.demo_data import KINDS, TILE_SIZE, Solution, digit_image, make_solution
from dreamprm_dist.prm.chat import (
    CHAT_TEMPLATE,
    IGNORE_INDEX,
    IMAGE_CONTEXT,
    IMAGE_END,
    IMAGE_START,
    ROLES,
    TURN_END,
    TURN_START,
    encode_conversation,
    label_token_ids,
)
from dreamprm_dist.prm.model import PRM
from dreamprm_dist.prm.solutions import SYSTEM_PROMPT, steps_conversation
from dreamprm_dist.prm.tiling import image_tiles
from dreamprm_dist.training.export import save_model

PAD = "<|endoftext|>"
SPECIAL_TOKENS = [PAD, TURN_START, TURN_END, IMAGE_START, IMAGE_END, IMAGE_CONTEXT]
VOCAB_SIZE = 512
PATCH_SIZE = 8
DOWNSAMPLE_RATIO = 0.5
# Without the reading steps first, verification is not learned in thousands of steps.
READING_STEPS, VERIFICATION_STEPS = 150, 700
BATCH_SIZE, LR = 32, 3e-3
VERIFICATION_ERRORS = (0.4, 0.3, 0.2, 0.1)  # of no error and of one in each step


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
    """The real model's configuration, 0.4 M parameters small: 32 px tiles, 4 tokens per tile."""
    text = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
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
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        attention_bias=True,
        initializer_range=0.05,
        layer_scale_init_value=1.0,
    )
    return InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.get_vocab()[IMAGE_CONTEXT],
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


def make_tiny_model(out: Path, texts: Iterable[str], seed: int = 0) -> Path:
    """Write a tiny InternVL with random weights; see `build_tiny_model`.

    Args:
        out: folder to write to.
        texts: turns' texts for the tokenizer.

    Returns:
        `out`.
    """
    model, tokenizer = build_tiny_model(texts, seed)
    save_model(out, PRM(model), tokenizer)
    return out


def data_texts(data: Path | str) -> list[str]:
    """The texts of all turns of the training records in a demo data set."""
    records = json.loads((Path(data) / "train.json").read_text())
    return [turn["value"] for record in records for turn in record["conversations"]]


def digit_tiles(digits: list[int], wide: bool) -> Tensor:
    """Tiles of digits, shape (digits, tiles, 3, size, size), each digit drawn in one way."""
    images = load_digits().images
    stacks = []
    for turn, digit in enumerate(digits):
        file = io.BytesIO()
        digit_image(images[digit], turn % 2 if wide else None).save(file, "PNG")
        stacks.append(image_tiles(file.getvalue(), max_tiles=6, tile_size=TILE_SIZE))
    return torch.stack(stacks)


class Pretraining:
    """Teaches a tiny model to read digits, then to verify solutions about them.

    Everything is cached: tiles once per digit, tokens once per text. Batches hold images of one
    size, so there is next to no padding.

    Args:
        model: trained in place.
        digits: indices of the digits to train on.
        seed: of batches and solutions.
    """

    def __init__(
        self,
        model: InternVLForConditionalGeneration,
        tokenizer: PreTrainedTokenizerFast,
        digits: list[int],
        seed: int,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.rng = np.random.default_rng(seed)
        self.tiles = {wide: digit_tiles(digits, wide) for wide in (False, True)}
        self.values = load_digits().target[digits].tolist()
        self.encode = lru_cache(maxsize=None)(self._encode)
        # The token after which a solution names the digit it sees, and the digits' tokens.
        _, self.naming = tokenizer.encode(f"{TURN_START}{ROLES['human']}\nThe digit is ")
        self.digit_ids = torch.tensor(tokenizer.convert_tokens_to_ids([str(d) for d in range(10)]))

    def _encode(self, kind: int, solution: Solution, tiles: int) -> tuple:
        # Neutral labels in the context: with the real ones there it learns to copy them.
        encoded = encode_conversation(
            steps_conversation(KINDS[kind].question, solution.steps, labels=solution.labels),
            self.tokenizer,
            tiles,
            self.model.config.image_seq_length,
            label_context="plus",
        )
        ids = torch.tensor(encoded.input_ids)
        naming = encoded.input_ids.index(self.naming)
        return ids, naming, encoded.step_positions, encoded.step_targets

    def batch(self, rows: Iterable[int], wide: bool, errors: tuple[float, ...]) -> dict:
        """One fresh solution for each of B digits.

        Returns:
            `pixels` (tiles, 3, size, size), `ids` (B, L), `naming`, `digits` (B,) and `steps`,
            `targets` (B, 3).
        """
        rows = list(rows)
        pixels = self.tiles[wide][rows]
        encoded = []
        for row in rows:
            kind = int(self.rng.integers(len(KINDS)))
            solution = make_solution(KINDS[kind], self.values[row], errors, self.rng)
            encoded.append(self.encode(kind, solution, pixels.shape[1]))
        ids, naming, steps, targets = zip(*encoded, strict=True)
        pad = self.tokenizer.pad_token_id
        return {
            "pixels": pixels.flatten(0, 1),
            "ids": torch.nn.utils.rnn.pad_sequence([*ids], batch_first=True, padding_value=pad),
            "naming": torch.tensor(naming),
            "digits": self.digit_ids[[self.values[row] for row in rows]],
            "steps": torch.tensor(steps),
            "targets": torch.tensor(targets),
        }

    def hidden(self, batch: dict) -> Tensor:
        """Last hidden states (B, L, width)."""
        return self.model.model(
            input_ids=batch["ids"], pixel_values=batch["pixels"], use_cache=False
        ).last_hidden_state

    def logits(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Logits at positions (B,) or (B, n) of each row."""
        rows = torch.arange(len(hidden))
        return self.model.lm_head(hidden[rows if positions.ndim == 1 else rows[:, None], positions])

    def language_loss(self, batch: dict) -> Tensor:
        """Next-token loss on the whole text, and once more on the digit that the solution names."""
        hidden = self.hidden(batch)
        targets = batch["ids"][:, 1:]
        targets = targets.where(targets != self.tokenizer.pad_token_id, IGNORE_INDEX)
        text = F.cross_entropy(self.model.lm_head(hidden[:, :-1]).flatten(0, 1), targets.flatten())
        return text + F.cross_entropy(self.logits(hidden, batch["naming"]), batch["digits"])

    def verification_loss(self, batch: dict) -> Tensor:
        """Loss on the step labels, and half as much on the digit, lest it forgets to see."""
        hidden = self.hidden(batch)
        steps = self.logits(hidden, batch["steps"]).flatten(0, 1)
        digits = F.cross_entropy(self.logits(hidden, batch["naming"]), batch["digits"])
        return F.cross_entropy(steps, batch["targets"].flatten()) + 0.5 * digits

    def train(self, num_steps: int, verify: bool) -> None:
        """`num_steps` AdamW steps on fresh batches, a tenth of them of wide images."""
        optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LR, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, LR, total_steps=num_steps, pct_start=0.1
        )
        loss_of = self.verification_loss if verify else self.language_loss
        errors = VERIFICATION_ERRORS if verify else (1.0, 0.0, 0.0, 0.0)
        self.model.train()
        for step in trange(num_steps, desc="learning to verify" if verify else "learning to read"):
            rows = self.rng.choice(len(self.values), BATCH_SIZE, replace=False)
            loss = loss_of(self.batch(rows, step % 10 == 9, errors))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        self.model.eval()

    @torch.no_grad()
    def accuracy(self) -> dict[str, float]:
        """Shares of digits read correctly and of steps of fresh solutions judged correctly."""
        batch = self.batch(range(len(self.values)), False, VERIFICATION_ERRORS)
        hidden = self.hidden(batch)
        named = self.logits(hidden, batch["naming"])[:, self.digit_ids].argmax(-1)
        labels = torch.tensor([*label_token_ids(self.tokenizer).values()])
        judged = labels[self.logits(hidden, batch["steps"])[..., labels].argmax(-1)]
        return {
            "digits": float((self.digit_ids[named] == batch["digits"]).float().mean()),
            "steps": float((judged == batch["targets"]).float().mean()),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description="Make and pretrain the demo's base model.")
    parser.add_argument("--data", type=Path, required=True, help="folder of demo_data")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--seed", type=int, default=1, help="seed of weights and batches")
    arguments = parser.parse_args()
    split = json.loads((arguments.data / "split.json").read_text())
    model, tokenizer = build_tiny_model(data_texts(arguments.data), arguments.seed)
    pretraining = Pretraining(model, tokenizer, split["train"] + split["meta"], arguments.seed)
    pretraining.train(READING_STEPS, verify=False)
    pretraining.train(VERIFICATION_STEPS, verify=True)
    save_model(arguments.out, PRM(model), tokenizer)
    held_out = Pretraining(model, tokenizer, split["test"], arguments.seed).accuracy()
    print(
        f"held-out digits: {held_out['digits']:.1%} read, {held_out['steps']:.1%} of steps judged"
    )


if __name__ == "__main__":
    main()
