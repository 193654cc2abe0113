"""How much faster the candidates of a question are scored behind one shared prefix.

    python tests/benchmarks/bench_best_of_n.py [--out bench.json]

A model with InternVL3-1B's proportions (the same ratios of widths, depths, tokens a tile and
vocabulary, all smaller), 7 tiles, 8 candidates. Plain scoring is the forward pass that training
takes, on each candidate with its image. Medians over interleaved repeats; the key is
`best_of_n.speedup_n8`.
"""

import argparse
import io
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    Qwen2Config,
)

from data_tools.demo_model import train_tokenizer
from dreamprm_dist.data.collate import InputFormat, collate, encode_instance
from dreamprm_dist.losses import step_scores
from dreamprm_dist.prm.chat import IMAGE_CONTEXT, label_token_ids
from dreamprm_dist.prm.model import PRM
from dreamprm_dist.scoring import score_solutions
from dreamprm_dist.solutions import SYSTEM_PROMPT, steps_conversation

REPEATS = 5
NUM_CANDIDATES = 8
MAX_TILES = 6  # and the thumbnail
QUESTION = "Which of the two angles in the figure is larger, and by how many degrees? " * 2
STEPS = [f"Step {i}: the angle at this corner is {31 * i} degrees." for i in range(1, 7)]


def make_prm() -> tuple[PRM, object]:
    """A quarter of InternVL3-1B's widths and depths, half the patches along each side."""
    tokenizer = train_tokenizer([SYSTEM_PROMPT, QUESTION, *STEPS])
    text = Qwen2Config(
        vocab_size=151674 // 16,
        hidden_size=896 // 4,
        intermediate_size=4864 // 4,
        num_hidden_layers=24 // 4,
        num_attention_heads=14,
        num_key_value_heads=2,
    )
    vision = InternVLVisionConfig(
        image_size=224,
        hidden_size=1024 // 4,
        intermediate_size=4096 // 4,
        num_hidden_layers=24 // 4,
        num_attention_heads=16 // 4,
        attention_bias=True,
    )
    config = InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT),
        image_seq_length=64,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return PRM(InternVLForConditionalGeneration(config)).eval(), tokenizer


@torch.no_grad()
def plain(prm: PRM, tokenizer, solutions: list[list[str]], image: bytes) -> list[float]:
    format = InputFormat(MAX_TILES, prm.tile_size, prm.tokens_per_tile)
    plus = label_token_ids(tokenizer)["+"]
    scores = []
    for steps in solutions:
        conversation = steps_conversation(QUESTION, steps)
        instance = encode_instance(conversation, [image], tokenizer, format)
        logits = prm(collate([instance], tokenizer.pad_token_id))
        scores += step_scores(logits, plus).tolist()
    return scores


def shared(prm: PRM, tokenizer, solutions: list[list[str]], image: bytes) -> list[float]:
    scores = score_solutions(prm, tokenizer, QUESTION, solutions, [image], max_tiles=MAX_TILES)
    return [score for steps in scores for score in steps]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    arguments = parser.parse_args()
    pixels = np.random.default_rng(0).integers(0, 256, (448, 672, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    solutions = [STEPS[i % 6 :] + STEPS[: i % 6] + [f"Answer: {i}"] for i in range(NUM_CANDIDATES)]
    prm, tokenizer = make_prm()
    seconds: dict = {plain: [], shared: []}
    for repeat in range(REPEATS + 1):
        scores = {}
        for way, times in seconds.items():
            start = time.perf_counter()
            scores[way] = way(prm, tokenizer, solutions, buffer.getvalue())
            if repeat:  # the first one warms up
                times.append(time.perf_counter() - start)
        np.testing.assert_allclose(scores[shared], scores[plain], rtol=1e-3)
    medians = {way.__name__: statistics.median(times) for way, times in seconds.items()}
    result = {
        "best_of_n": {
            "speedup_n8": medians["plain"] / medians["shared"],
            "seconds": medians,
            "candidates_per_second": NUM_CANDIDATES / medians["shared"],
        }
    }
    print(json.dumps(result, indent=2))
    # Other benchmarks write their own keys into the same file.
    before = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    arguments.out.write_text(json.dumps(before | result, indent=2) + "\n")


if __name__ == "__main__":
    main()
