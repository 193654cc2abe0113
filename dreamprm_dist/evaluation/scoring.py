"""Scores of every step of several solutions of one question."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from dreamprm_dist.errors import InputError, RecordError
from dreamprm_dist.losses import ScoreOver, step_scores
from dreamprm_dist.prm.chat import EncodedConversation, encode_conversation, label_token_ids
from dreamprm_dist.prm.model import PRM
from dreamprm_dist.prm.shared_prefix import step_logits
from dreamprm_dist.prm.solutions import SYSTEM_PROMPT, steps_conversation
from dreamprm_dist.prm.tiling import image_tiles


def score_solutions(
    prm: PRM,
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    solutions: Sequence[Sequence[str]],
    images: Sequence[bytes],
    *,
    max_tiles: int,
    score_over: ScoreOver = "vocabulary",
    system_prompt: str = SYSTEM_PROMPT,
) -> list[list[float]]:
    """P(+) after each step of each solution of a question; see `score_conversations`.

    Args:
        solutions: for each solution its steps.
    """
    conversations = []
    for index, steps in enumerate(solutions):
        try:
            conversations.append(steps_conversation(question, steps, system_prompt))
        except InputError as error:
            raise RecordError(f"candidate {index}: {error}") from error
    return score_conversations(
        prm, tokenizer, conversations, images, max_tiles=max_tiles, score_over=score_over
    )


@torch.no_grad()
def score_conversations(
    prm: PRM,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[dict]],
    images: Sequence[bytes],
    *,
    max_tiles: int,
    score_over: ScoreOver = "vocabulary",
) -> list[list[float]]:
    """P(+) after each step of conversations about the same images; the PRM is left evaluating.

    The conversations of a question are one batch of their own, so that no score depends on what
    else a process has to do. Within it they stand in an order of their own and equal ones once:
    neither the order of the conversations nor a repeated one changes any score.

    Args:
        conversations: turns as in `prm.chat.encode_conversation`; labels are not looked at.
        images: encoded images, checked by `data.images.decode_image`.
        max_tiles: most tiles of an image, thumbnail not counted.
        score_over: what P is taken over, see `losses.step_scores`.

    Returns:
        For each conversation the score of each of its steps, in [0, 1].

    Raises:
        RecordError: a conversation cannot be encoded; it is named by its index, as a candidate.
        InputError: a score is not a number.
    """
    tiles = [image_tiles(data, max_tiles, prm.tile_size) for data in images]
    counts = [len(part) for part in tiles]
    encoded: list[EncodedConversation] = []
    for index, turns in enumerate(conversations):
        try:
            conversation = encode_conversation(
                turns, tokenizer, counts, prm.tokens_per_tile, label_context="plus"
            )
            if (length := len(conversation.input_ids)) > prm.max_length:
                raise InputError(
                    f"{length} tokens are more than the model's context of {prm.max_length}; lower "
                    f"max_patch_num, now {max_tiles}, or leave the question out"
                )
        except InputError as error:
            raise RecordError(f"candidate {index}: {error}") from error
        encoded.append(conversation)

    distinct = {tuple(conversation.input_ids): conversation for conversation in encoded}
    order = sorted(distinct, key=lambda ids: (len(ids), ids))
    pixel_values = torch.cat(tiles) if tiles else torch.empty(0, 3, *[prm.tile_size] * 2)
    prm.eval()
    logits = step_logits(prm, [distinct[ids] for ids in order], pixel_values.to(prm.model.device))
    label_ids = label_token_ids(tokenizer)
    scores = {
        ids: step_scores(part, label_ids, "+", score_over).tolist()
        for ids, part in zip(order, logits, strict=True)
    }
    result = [scores[tuple(conversation.input_ids)] for conversation in encoded]
    for index, values in enumerate(result):
        if any(math.isnan(value) for value in values):
            raise InputError(
                f"candidate {index}: a step score is not a number; the model's weights are broken "
                "or overflow in this precision, try fp32"
            )
    return result
