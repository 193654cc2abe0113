"""A PRM that scores: every step of several solutions of one question, and the best of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Literal, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from dreamprm_dist.data.schema import SOLUTION_MARK, Turn, is_unicode, question_turn
from dreamprm_dist.errors import InputError, RecordError
from dreamprm_dist.evaluation.best_of_n import aggregate_candidates, select
from dreamprm_dist.losses import ScoreOver, step_scores
from dreamprm_dist.prm.chat import EncodedConversation, encode_conversation, label_token_ids
from dreamprm_dist.prm.model import PRM, load_prm, load_tokenizer
from dreamprm_dist.prm.shared_prefix import step_logits
from dreamprm_dist.prm.solutions import split_steps, step_turns, steps_conversation
from dreamprm_dist.prm.tiling import image_tiles

AnyScorer = TypeVar("AnyScorer", bound="Scorer")


@dataclass(frozen=True)
class BestOfN:
    """N candidate solutions as the PRM sees them.

    Attributes:
        index: the chosen candidate, that of the highest score; ties go to the first. None when no
            candidate could be scored.
        scores: N aggregated scores, None for a candidate that could not be scored.
        steps: for each candidate the texts of its steps.
        step_scores: for each candidate the score of each of its steps, in [0, 1], or None.
        errors: for each candidate why it could not be scored, or None.
    """

    index: int | None
    scores: list[float | None]
    steps: list[list[str]]
    step_scores: list[list[float] | None]
    errors: list[str | None]


class Scorer:
    """A PRM with its tokenizer, and how it reads and scores.

    Args:
        module: the network, as `prm.model.load_prm` loads it.
        tokenizer: its tokenizer.
        max_patch_num: most tiles of an image, thumbnail not counted.
        score_over: what a step's probability is taken over, see `losses.step_scores`.
    """

    def __init__(
        self,
        module: PRM,
        tokenizer: PreTrainedTokenizerBase,
        max_patch_num: int = 12,
        score_over: ScoreOver = "vocabulary",
    ):
        if max_patch_num < 1:
            raise InputError(f"max_patch_num is {max_patch_num}; it must be at least 1")
        self.module, self.tokenizer, self.max_patch_num = module.eval(), tokenizer, max_patch_num
        self.score_over = score_over

    @classmethod
    def from_pretrained(
        cls: type[AnyScorer],
        name_or_path: str | Path,
        *,
        precision: Literal["bf16", "fp32"] = "bf16",
        device: str | torch.device | None = None,
        max_patch_num: int = 12,
        score_over: ScoreOver = "vocabulary",
    ) -> AnyScorer:
        """Load a PRM from a local folder or the hub, in either InternVL3 layout, no remote code.

        Args:
            device: where it runs; by default the GPU where there is one.

        Raises:
            InputError: it is no InternVL3 checkpoint, or its tensors do not fit.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        module = load_prm(str(name_or_path), precision, device)
        return cls(module, load_tokenizer(str(name_or_path)), max_patch_num, score_over)

    def choose(
        self,
        question: str,
        candidates: Sequence[str | Sequence[str]],
        images: Sequence[bytes],
        aggregation: str,
    ) -> BestOfN:
        """Score N >= 1 candidate solutions of a question, choose one of those that have scores.

        Args:
            candidates: for each candidate its text, which is split into steps, or its steps.
            images: as in `score_conversations`.
            aggregation: a key of `AGGREGATIONS`.

        Raises:
            RecordError, InputError: as `score_conversations`.
        """
        steps = [split_steps(c) if isinstance(c, str) else list(c) for c in candidates]
        found = self.score_solutions(question, steps, images)
        errors = [str(result) if isinstance(result, RecordError) else None for result in found]
        step_scores = [None if isinstance(result, RecordError) else result for result in found]
        if all(errors):
            return BestOfN(None, [None] * len(steps), steps, step_scores, errors)
        totals = aggregate_candidates(step_scores, [aggregation])[aggregation]
        scores = [None if error else total for total, error in zip(totals, errors, strict=True)]
        return BestOfN(select(totals), scores, steps, step_scores, errors)

    def score_solutions(
        self, question: str, solutions: Sequence[Sequence[str]], images: Sequence[bytes]
    ) -> list[list[float] | RecordError]:
        """P(+) after each step of each solution of a question; see `score_conversations`.

        Args:
            solutions: for each solution its steps; steps without any text are none.
        """
        conversations = [
            steps_conversation(question, steps if any(map(str.strip, steps)) else [])
            for steps in solutions
        ]
        return self.score_conversations(conversations, images)

    @torch.no_grad()
    def score_conversations(
        self, conversations: Sequence[Sequence[Turn]], images: Sequence[bytes]
    ) -> list[list[float] | RecordError]:
        """P(+) after each step of conversations about the same images; the PRM is left evaluating.

        The conversations of a question are one batch of their own, so that no score depends on
        what else a rank has to do. Within it they stand in an order of their own and equal ones
        once: neither the order of the conversations nor a repeated one changes any score.

        Args:
            conversations: turns as in `prm.chat.encode_conversation`; labels are not looked at.
            images: encoded images, checked by `data.images.decode_image`.

        Returns:
            For each conversation the score of each of its steps, in [0, 1], or why it has none:
            there is no step, or it is longer than the model's context.

        Raises:
            RecordError: no conversation can be scored, for their question or an image is at fault.
            InputError: a score is not a number.
        """
        prm, label_ids = self.module.eval(), label_token_ids(self.tokenizer)
        tiles = [image_tiles(data, self.max_patch_num, prm.tile_size) for data in images]
        encoded = [self._encoded(turns, [len(part) for part in tiles]) for turns in conversations]
        distinct = {
            tuple(conversation.input_ids): conversation
            for conversation in encoded
            if not isinstance(conversation, RecordError)
        }
        if not distinct:
            return [error for error in encoded if isinstance(error, RecordError)]
        order = sorted(distinct, key=lambda ids: (len(ids), ids))
        pixel_values = torch.cat(tiles) if tiles else torch.empty(0, 3, *[prm.tile_size] * 2)
        logits = step_logits(
            prm, [distinct[ids] for ids in order], pixel_values.to(prm.model.device)
        )
        scores = {
            ids: step_scores(part, label_ids, "+", self.score_over).tolist()
            for ids, part in zip(order, logits, strict=True)
        }
        if any(math.isnan(score) for steps in scores.values() for score in steps):
            raise InputError(
                "a step score is not a number; the model's weights are broken or overflow in this "
                "precision, try fp32"
            )
        return [
            conversation
            if isinstance(conversation, RecordError)
            else scores[tuple(conversation.input_ids)]
            for conversation in encoded
        ]

    def _encoded(
        self, turns: Sequence[Turn], num_tiles: list[int]
    ) -> EncodedConversation | RecordError:
        def encode(turns: Sequence[Turn]) -> EncodedConversation:
            return encode_conversation(
                turns, self.tokenizer, num_tiles, self.module.tokens_per_tile, "plus"
            )

        if not any(turn["from"] == "gpt" for turn in turns):
            return RecordError("there is no step to score: the text is empty")
        if not all(is_unicode(turn["value"] or "") for turn in turns):
            return RecordError("the text holds half a surrogate pair; write it as valid Unicode")
        most = self.module.max_length
        conversation = encode(turns)
        if (length := len(conversation.input_ids)) <= most:
            return conversation
        asked = question_turn(turns).partition(SOLUTION_MARK)[0]
        before = takewhile(lambda turn: turn["from"] == "system", turns)
        question: list[Turn] = [
            *before,
            {"from": "human", "value": asked},
            *step_turns([""], [None]),
        ]
        if (asking := len(encode(question).input_ids)) > most:
            raise RecordError(
                f"the question and its images are {asking} tokens, more than the model's context "
                f"of {most}; lower max_patch_num, now {self.max_patch_num}, or leave it out"
            )
        return RecordError(
            f"{length} tokens are more than the model's context of {most}; {asking} are those of "
            f"the question and its images, fewer with a max_patch_num below {self.max_patch_num}"
        )
