"""The PRM in Python: load it, score the steps of a solution, choose the best of N candidates."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from dreamprm_dist.data.images import as_seen, decode_image, read_image
from dreamprm_dist.errors import InputError, RecordError
from dreamprm_dist.evaluation.scoring import BestOfN, Scorer
from dreamprm_dist.prm.aggregation import AGGREGATIONS

ImageLike = str | Path | bytes | Image.Image


class PRM(Scorer):
    """A trained process reward model.

    It is given images as paths, as encoded bytes (JPEG, PNG, WEBP, BMP, GIF) or as Pillow images of
    any mode, and takes them `as_seen`; one image need not be in a list, and None stands for none.
    Its arguments are those of `Scorer`.
    """

    def score(
        self, images: ImageLike | Sequence[ImageLike] | None, question: str, steps: Sequence[str]
    ) -> list[float]:
        """The score of each step: how probable it is that the solution is right up to there.

        Raises:
            InputError: no step, an image that cannot be read, or a text that is too long for the
                model.
        """
        if isinstance(steps, str):
            raise InputError("steps is one text; give a list with the text of each step")
        (found,) = self.score_solutions(question, [steps], _encoded(images))
        if isinstance(found, RecordError):
            raise found
        return found

    def best_of_n(
        self,
        images: ImageLike | Sequence[ImageLike] | None,
        question: str,
        candidates: Sequence[str | Sequence[str]],
        aggregation: str = "mean",
    ) -> BestOfN:
        """Score N candidate solutions of a question and choose one.

        Neither the order of the candidates nor a repeated one changes any score. A candidate that
        is empty or too long for the model has no score and is not chosen; `errors` says why.

        Args:
            candidates: for each candidate its text, which is split at blank lines, numbered lines
                and `Answer:`, or its steps.
            aggregation: a key of `AGGREGATIONS`: how step scores become a candidate's score.

        Raises:
            InputError: an image that cannot be read, a question that is too long for the model, no
                candidate, or an unknown aggregation.
        """
        if aggregation not in AGGREGATIONS:
            raise InputError(
                f"unknown aggregation {aggregation!r}; choose from {', '.join(AGGREGATIONS)}"
            )
        if isinstance(candidates, str):
            raise InputError("candidates is one text; give a list of candidates")
        if not candidates:
            raise InputError("there is no candidate; give at least one")
        return self.choose(question, candidates, _encoded(images), aggregation)


def _encoded(images: ImageLike | Sequence[ImageLike] | None) -> list[bytes]:
    if images is None or isinstance(images, ImageLike):
        images = [] if images is None else [images]
    return [_encoded_image(image) for image in images]


def _encoded_image(image: ImageLike) -> bytes:
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        try:
            as_seen(image).save(buffer, "PNG")
        except InputError:
            raise
        except Exception as error:  # nearly anything: Pillow reads a file's pixels only now
            raise InputError(f"the image cannot be read ({error}); open it again") from error
        return buffer.getvalue()
    if isinstance(image, bytes):
        decode_image(image)
        return image
    return read_image(image, str(image))[0]
