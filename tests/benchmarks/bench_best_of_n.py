"""How much faster the candidates of a question are scored behind one shared prefix.

    python tests/benchmarks/bench_best_of_n.py [--out bench.json]

A model with InternVL3-1B's proportions (the same ratios of widths, depths, tokens a tile and
vocabulary, all smaller), 7 tiles, 8 candidates. Plain scoring is the forward pass that training
takes, on each candidate with its image. Medians over interleaved repeats; the key is
`best_of_n.speedup_n8`.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from standin import QUESTION, STEPS, make_model, png, write_results

from dreamprm_dist.evaluation.scoring import Scorer
from dreamprm_dist.losses import step_scores
from dreamprm_dist.prm.batch import InputFormat, collate, encode_instance
from dreamprm_dist.prm.chat import label_token_ids
from dreamprm_dist.prm.model import PRM
from dreamprm_dist.prm.solutions import steps_conversation

REPEATS = 5
NUM_CANDIDATES = 8
MAX_TILES = 6  # and the thumbnail


@torch.no_grad()
def plain(prm: PRM, tokenizer, solutions: list[list[str]], image: bytes) -> list[float]:
    format = InputFormat(MAX_TILES, prm.tile_size, prm.tokens_per_tile)
    label_ids = label_token_ids(tokenizer)
    scores = []
    for steps in solutions:
        conversation = steps_conversation(QUESTION, steps)
        instance = encode_instance(conversation, [image], tokenizer, format)
        logits = prm(collate([instance], tokenizer.pad_token_id)).logits
        scores += step_scores(logits, label_ids).tolist()
    return scores


def shared(prm: PRM, tokenizer, solutions: list[list[str]], image: bytes) -> list[float]:
    scores = Scorer(prm, tokenizer, MAX_TILES).score_solutions(QUESTION, solutions, [image])
    return [score for steps in scores for score in steps]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    arguments = parser.parse_args()
    image = png(672, 448)
    solutions = [STEPS[i % 6 :] + STEPS[: i % 6] + [f"Answer: {i}"] for i in range(NUM_CANDIDATES)]
    model, tokenizer = make_model(divisor=4, image_size=224)
    prm = PRM(model).eval()
    seconds: dict = {plain: [], shared: []}
    for repeat in range(REPEATS + 1):
        scores = {}
        for way, times in seconds.items():
            start = time.perf_counter()
            scores[way] = way(prm, tokenizer, solutions, image)
            if repeat:  # the first one warms up
                times.append(time.perf_counter() - start)
        np.testing.assert_allclose(scores[shared], scores[plain], rtol=1e-3)
    medians = {way.__name__: statistics.median(times) for way, times in seconds.items()}
    results = {
        "best_of_n": {
            "speedup_n8": medians["plain"] / medians["shared"],
            "seconds": medians,
            "candidates_per_second": NUM_CANDIDATES / medians["shared"],
        }
    }
    write_results(arguments.out, results)


if __name__ == "__main__":
    main()
