"""What the benchmarks share: a model with InternVL3-1B's proportions, data for it, `bench.json`."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    PreTrainedTokenizerBase,
    Qwen2Config,
)

from data_tools.demo_model import train_tokenizer
from data_tools.shard import shard_file
from dreamprm_dist import distributed
from dreamprm_dist.data.shards import ShardFolder
from dreamprm_dist.prm.batch import Batch
from dreamprm_dist.prm.chat import IMAGE_CONTEXT
from dreamprm_dist.prm.model import PRM
from dreamprm_dist.prm.solutions import SYSTEM_PROMPT, steps_conversation
from dreamprm_dist.training.config import parse_train_config
from dreamprm_dist.training.export import save_model
from dreamprm_dist.training.run import TrainingRun

QUESTION = "Which of the two angles in the figure is larger, and by how many degrees? " * 2
STEPS = [f"Step {i}: the angle at this corner is {31 * i} degrees." for i in range(1, 7)]
SOLUTIONS_PER_QUESTION = 8


def make_model(
    divisor: int, image_size: int = 448
) -> tuple[InternVLForConditionalGeneration, PreTrainedTokenizerBase]:
    """InternVL3-1B with random weights and its own tokenizer.

    Args:
        divisor: 1 for the full size; widths and depths are divided by it, the vocabulary by its
            square, so that the head keeps its share of the work.
        image_size: side of a tile; half of 448 gives a quarter of the tokens.
    """
    tokenizer = train_tokenizer([SYSTEM_PROMPT, QUESTION, *STEPS])
    text = Qwen2Config(
        vocab_size=max(151674 // divisor**2, len(tokenizer)),
        hidden_size=896 // divisor,
        intermediate_size=4864 // divisor,
        num_hidden_layers=24 // divisor,
        num_attention_heads=14,
        num_key_value_heads=2,
        rope_theta=1e6,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = InternVLVisionConfig(
        image_size=image_size,
        hidden_size=1024 // divisor,
        intermediate_size=4096 // divisor,
        num_hidden_layers=24 // divisor,
        num_attention_heads=16 // divisor,
        attention_bias=True,
    )
    config = InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT),
        image_seq_length=(image_size // 28) ** 2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return InternVLForConditionalGeneration(config), tokenizer


def saved_model(folder: Path, divisor: int, image_size: int = 448) -> Path:
    """Write `make_model`'s PRM into a folder; returns the folder."""
    model, tokenizer = make_model(divisor, image_size)
    save_model(folder, PRM(model), tokenizer)
    return folder


def run_on_ranks(num_ranks: int, *command: object, **options: Any) -> None:
    """Run a Python command on ranks of this machine, one thread each.

    Args:
        options: of `subprocess.run`.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", num_ranks]
    subprocess.run(
        [sys.executable, *map(str, launcher), *map(str, command)],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        **options,
    )


def png(width: int, height: int, seed: int = 0) -> bytes:
    """An image file of noise, which cannot be compressed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def make_data(
    folder: Path,
    num_train: int,
    num_meta: int,
    size: tuple[int, int],
    num_shards: int = 1,
    solutions_per_question: int = SOLUTIONS_PER_QUESTION,
) -> None:
    """Shard folders `train` and `meta`: an image (width, height) a record, or a meta question.

    Args:
        num_meta: meta solutions.
        solutions_per_question: how many of them share an image.
    """
    (folder / "images").mkdir(parents=True)

    def record(index: int, image: int, num_steps: int) -> dict:
        path = f"images/{image}.png"
        if not (folder / path).exists():
            (folder / path).write_bytes(png(*size, seed=image))
        labels = ["+-"[(index + step) % 2] for step in range(num_steps)]
        return {
            "id": f"{image}",
            "image": path,
            "dataset": "noise",
            "conversations": steps_conversation(QUESTION, STEPS[:num_steps], labels=labels),
        }

    train = [record(i, i, 3 + i % 4) for i in range(num_train)]
    meta = [
        record(i, num_train + i // solutions_per_question, 3 + i % 4)
        | {"true_false": i % 2 == 0, "response": str(i)}
        for i in range(num_meta)
    ]
    for name, kind, records in (("train", "training", train), ("meta", "meta", meta)):
        (folder / f"{name}.json").write_text(json.dumps(records))
        shard_file(folder / f"{name}.json", folder / name, kind, num_shards, progress=False)


def make_run(folder: Path, model: Path, *flags: object) -> TrainingRun:
    """A run on the data of `make_data`."""
    config = parse_train_config(
        [
            *("--reward_model", str(model), "--weights_path", str(folder / "run")),
            *("--num_workers", "0", "--scheduler_type", "constant", *map(str, flags)),
        ]
    )
    device = distributed.initialize(config.run.device)
    return TrainingRun(config, ShardFolder(folder / "train"), ShardFolder(folder / "meta"), device)


def plain_step(run: TrainingRun, batches: Sequence[Batch]) -> None:
    """A lower step with no meta level, every weight 1."""
    run.trainer.engine.lower_step(
        batches,
        run.trainer.lower_losses,
        lambda output, losses, b: torch.ones(len(b), device=losses.device),
    )


def on_device(device: str) -> tuple[str, ...]:
    """Flags of a run that trains there as one does: in bf16 on a GPU."""
    return ("--device", device, "--precision", "bf16" if device == "cuda" else "fp32")


def write_results(out: Path, results: dict) -> None:
    """Print results and add their keys to a JSON file that other benchmarks write to as well."""
    print(json.dumps(results, indent=2), flush=True)
    before = json.loads(out.read_text()) if out.exists() else {}
    out.write_text(json.dumps(before | results, indent=2) + "\n")
