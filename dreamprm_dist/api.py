"""The PRM in Python: load it, score the steps of a solution, choose the best of N candidates."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from dreamprm_dist.data.images import decode_image, read_image
from dreamprm_dist.errors import InputError
from dreamprm_dist.evaluation.best_of_n import aggregate_candidates, select
from dreamprm_dist.evaluation.scoring import score_solutions
from dreamprm_dist.losses import ScoreOver
from dreamprm_dist.prm import model as network
from dreamprm_dist.prm.aggregation import AGGREGATIONS
from dreamprm_dist.prm.solutions import split_steps

ImageLike = str | Path | bytes | Image.Image


@dataclass(frozen=True)
class BestOfN:
    """What the PRM makes of N candidate solutions.

    Attributes:
        index: the chosen candidate, that of the highest score; ties go to the first.
        scores: N aggregated scores.
        steps: for each candidate the texts of its steps.
        step_scores: for each candidate the score of each of its steps, in [0, 1].
    """

    index: int
    scores: list[float]
    steps: list[list[str]]
    step_scores: list[list[float]]


class PRM:
    """A trained process reward model.

    It is given images as paths, as encoded bytes (JPEG, PNG, WEBP, BMP, GIF) or as Pillow images;
    one image need not be in a list, and None stands for none.

    Args:
        module: the network, as `prm.model.load_prm` loads it.
        tokenizer: its tokenizer.
        max_patch_num: most tiles of an image, thumbnail not counted.
        score_over: what a step's probability is taken over, see `losses.step_scores`.
    """

    def __init__(
        self,
        module: network.PRM,
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
        cls,
        name_or_path: str | Path,
        *,
        precision: Literal["bf16", "fp32"] = "bf16",
        device: str | torch.device | None = None,
        max_patch_num: int = 12,
        score_over: ScoreOver = "vocabulary",
    ) -> PRM:
        """Load a PRM from a local folder or the hub, in either InternVL3 layout, no remote code.

        Args:
            device: where it runs; by default the GPU where there is one.

        Raises:
            InputError: it is no InternVL3 checkpoint, or its tensors do not fit.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        module = network.load_prm(str(name_or_path), precision, device)
        return cls(module, network.load_tokenizer(str(name_or_path)), max_patch_num, score_over)

    def score(
        self, images: ImageLike | Sequence[ImageLike] | None, question: str, steps: Sequence[str]
    ) -> list[float]:
        """The score of each step: how probable it is that the solution is right up to there.

        Raises:
            InputError: no step, an image that cannot be read, a text that is too long for the
                model, or one that holds a reserved token of the chat format.
        """
        if isinstance(steps, str):
            raise InputError("steps is one text; give a list with the text of each step")
        return self._score(images, question, [steps])[0]

    def best_of_n(
        self,
        images: ImageLike | Sequence[ImageLike] | None,
        question: str,
        candidates: Sequence[str | Sequence[str]],
        aggregation: str = "mean",
    ) -> BestOfN:
        """Score N candidate solutions of a question and choose one.

        Neither the order of the candidates nor a repeated one changes any score.

        Args:
            candidates: for each candidate its text, which is split at blank lines, numbered lines
                and `Answer:`, or its steps.
            aggregation: a key of `AGGREGATIONS`: how step scores become a candidate's score.

        Raises:
            InputError: as `score`; the candidate is named. No candidate, or an unknown aggregation.
        """
        if aggregation not in AGGREGATIONS:
            raise InputError(
                f"unknown aggregation {aggregation!r}; choose from {', '.join(AGGREGATIONS)}"
            )
        if isinstance(candidates, str):
            raise InputError("candidates is one text; give a list of candidates")
        if not candidates:
            raise InputError("there is no candidate; give at least one")
        steps = [split_steps(c) if isinstance(c, str) else list(c) for c in candidates]
        step_scores = self._score(images, question, steps)
        scores = aggregate_candidates(step_scores, [aggregation])[aggregation]
        return BestOfN(select(scores), scores, steps, step_scores)

    def _score(
        self,
        images: ImageLike | Sequence[ImageLike] | None,
        question: str,
        solutions: Sequence[Sequence[str]],
    ) -> list[list[float]]:
        if images is None or isinstance(images, ImageLike):
            images = [] if images is None else [images]
        return score_solutions(
            self.module,
            self.tokenizer,
            question,
            solutions,
            [_encoded(image) for image in images],
            max_tiles=self.max_patch_num,
            score_over=self.score_over,
        )


def _encoded(image: ImageLike) -> bytes:
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        try:
            image.convert("RGB").save(buffer, "PNG")
        except OSError as error:  # Pillow reads a file's pixels only now
            raise InputError(f"the image cannot be read ({error}); open it again") from error
        return buffer.getvalue()
    if isinstance(image, bytes):
        decode_image(image)
        return image
    return read_image(image, str(image))[0]
