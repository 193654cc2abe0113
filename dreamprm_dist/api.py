"""The PRM in Python: load it, score the steps of a solution, choose the best of N candidates."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from PIL import Image

from dreamprm_dist.data.images import as_seen, decode_image, read_image
from dreamprm_dist.errors import InputError, RecordError
from dreamprm_dist.evaluation.scoring import BestOfN, Scorer
from dreamprm_dist.prm.aggregation import AGGREGATIONS

ImageLike = str | Path | bytes | bytearray | Image.Image
MOST_PATH = 4096  # characters, as Linux has it


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
        _check_text("question", question)
        _check_texts("steps", steps)
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
        if not isinstance(aggregation, str) or aggregation not in AGGREGATIONS:
            raise InputError(
                f"unknown aggregation {aggregation!r}; choose from {', '.join(AGGREGATIONS)}"
            )
        _check_text("question", question)
        _check_list("candidates", candidates, "a text, or the list of its steps, for each")
        if not candidates:
            raise InputError("there is no candidate; give at least one")
        for i, candidate in enumerate(candidates):
            if not isinstance(candidate, str):
                _check_texts(f"candidates[{i}]", candidate)
        return self.choose(question, candidates, _encoded(images), aggregation)


def _check_list(name: str, value: object, entries: str) -> None:
    if not isinstance(value, list | tuple):
        raise InputError(f"{name} is {_kind(value)}; give a list with {entries}")


def _check_texts(name: str, value: object) -> None:
    _check_list(name, value, "the text of each step")
    for i, text in enumerate(cast(Sequence[object], value)):
        _check_text(f"{name}[{i}]", text)


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise InputError(f"{name} is {_kind(value)}; give a text")


def _kind(value: object) -> str:
    return "one text" if isinstance(value, str) else f"of type {type(value).__name__}"


def _encoded(images: ImageLike | Sequence[ImageLike] | None) -> list[bytes]:
    if images is None:
        return []
    if not isinstance(images, list | tuple):
        return [_encoded_image(images, "the image")]  # type: ignore[arg-type]
    return [_encoded_image(image, f"images[{i}]") for i, image in enumerate(images)]


def _encoded_image(image: ImageLike, name: str) -> bytes:
    if isinstance(image, str | Path):
        if len(str(image)) > MOST_PATH:
            raise InputError(f"{name} is a text of {len(str(image))} characters and no path")
        return read_image(image, str(image))[0]
    if isinstance(image, bytes | bytearray):
        try:
            decode_image(bytes(image))
        except RecordError as error:
            raise RecordError(f"{name}: {error}") from error
        return bytes(image)
    if not isinstance(image, Image.Image):
        # Whether an array is RGB or BGR, 0 to 1 or to 255, only its owner knows.
        raise InputError(
            f"{name} is {_kind(image)}; give a path, the bytes of an image file or a Pillow image "
            "(of an array: PIL.Image.fromarray)"
        )
    buffer = io.BytesIO()
    try:
        as_seen(image).save(buffer, "PNG")
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    except Exception as error:  # nearly anything: Pillow reads a file's pixels only now
        raise InputError(f"{name} cannot be read ({error}); open it again") from error
    return buffer.getvalue()
