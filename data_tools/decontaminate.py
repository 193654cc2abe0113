"""Remove training records that touch the meta or test set, and say why.

    python -m data_tools.decontaminate train.jsonl --against meta.jsonl test.jsonl --out clean.jsonl

A record touches another when it shares an image (equal bytes), when its image looks the same
(perceptual hash) or when it asks the same question (text without case, punctuation and image
marks). Removed records are listed in ``<out>.rejected.jsonl`` with every reason.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import unicodedata
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from data_tools.record_files import (
    RecordWriter,
    add_output,
    image_prefix,
    read_with_progress,
    with_prefix,
)
from dreamprm_dist.data.images import read_image
from dreamprm_dist.data.schema import (
    QUESTION_PREFIX,
    SOLUTION_MARK,
    parse_test_record,
    parse_training_record,
    read_json_records,
    require_object,
)
from dreamprm_dist.errors import InputError, RecordError
from dreamprm_dist.flags import run

CHECKS = ("image", "lookalike", "question")
HASH_SIDE = 16  # 256 bits
# Bits of 256: re-encoded, resized copies of line drawings differ in up to about 20, a drawing with
# one corner moved by 3 % in 36 and more, unrelated ones in 80 to 150.
MAX_DISTANCE = 24
_IMAGE_MARK = re.compile(r"<image(?: \d+)?>")
_FLAT = 2.0  # grey levels; below it a picture shows nothing that a hash could tell apart


class Fingerprint(NamedTuple):
    """Properties that copies of an image share.

    Attributes:
        digest: SHA-256 of the bytes.
        lookalike: (32,) uint8 perceptual hash; None for a flat image.
    """

    digest: bytes
    lookalike: np.ndarray | None


def normalised_question(text: str) -> str:
    """A question's letters and digits in lower case, words apart by one space.

    Markup of the chat format, image marks and a leading ``Question:`` do not count.
    """
    text = text.partition(SOLUTION_MARK)[0].strip().removeprefix(QUESTION_PREFIX.strip())
    text = unicodedata.normalize("NFKC", _IMAGE_MARK.sub(" ", text)).casefold()
    return " ".join(re.findall(r"[^\W_]+", text.strip().removeprefix("question:")))


def perceptual_hash(image: Image.Image) -> np.ndarray | None:
    """The signs of an image's lowest frequencies, (32,) uint8; None for a flat image.

    pHash (Zauner, 2010) with 16 x 16 coefficients of the cosine transform of the 64 x 64 grey
    image, each against their median: re-encoding and resizing change few of the 256 bits.
    """
    if image.has_transparency_data:  # over white, as on a page
        rgba = image.convert("RGBA")
        image = Image.new("RGBA", rgba.size, "white")
        image.alpha_composite(rgba)
    side = 4 * HASH_SIDE
    small = image.convert("L").resize((side, side), Image.Resampling.LANCZOS)
    pixels = np.asarray(small, dtype=np.float64)
    if pixels.std() < _FLAT:
        return None
    frequencies, positions = np.arange(1, HASH_SIDE + 1), np.arange(side) + 0.5
    basis = np.cos(np.pi / side * frequencies[:, None] * positions)
    coefficients = basis @ pixels @ basis.T
    return np.packbits(coefficients > np.median(coefficients))


@lru_cache(maxsize=4096)  # solutions of one question share an image, and decoding it is the cost
def _fingerprint(path: str, shown: str) -> Fingerprint:
    data, image = read_image(path, shown)
    return Fingerprint(hashlib.sha256(data).digest(), perceptual_hash(image))


class Protected:
    """The questions and images that training must not see."""

    def __init__(self, max_distance: int = MAX_DISTANCE) -> None:
        self.max_distance = max_distance
        self._questions: dict[str, str] = {}
        self._digests: dict[bytes, str] = {}
        self._hashes: list[np.ndarray] = []
        self._places: list[str] = []

    def add_file(self, path: Path, image_root: Path | None) -> None:
        """Protect every record of a meta, test or training file.

        Raises:
            InputError: a record or an image cannot be read: it could not be protected.
        """
        root = path.parent if image_root is None else image_root
        for line, raw in read_json_records(path):
            where = f"{path}, line {line}"
            try:
                question, images = _question_and_images(require_object(raw))
                prints = [_fingerprint(str(root / image), image) for image in images]
            except RecordError as error:
                raise InputError(f"{where}: {error}") from error
            self._questions.setdefault(normalised_question(question), where)
            for image in prints:
                if image.digest not in self._digests:
                    self._digests[image.digest] = where
                    if image.lookalike is not None:
                        self._hashes.append(image.lookalike)
                        self._places.append(where)
        self._table = np.array(self._hashes, dtype=np.uint8).reshape(-1, HASH_SIDE**2 // 8)

    def same_question(self, text: str) -> str | None:
        """The place of the protected question; None for another one, or one without words."""
        question = normalised_question(text)
        return self._questions.get(question) if question else None

    def same_image(self, image: Fingerprint) -> str | None:
        """The place of the protected image of these bytes."""
        return self._digests.get(image.digest)

    def lookalike(self, image: Fingerprint) -> str | None:
        """The place of the nearest image within `max_distance` bits, and its distance."""
        if image.lookalike is None or not len(self._table):
            return None
        distances = np.unpackbits(self._table ^ image.lookalike, axis=1).sum(axis=1)
        nearest = int(distances.argmin())
        if distances[nearest] > self.max_distance:
            return None
        return f"{self._places[nearest]} ({distances[nearest]} of {HASH_SIDE**2} bits differ)"


def _question_and_images(record: dict) -> tuple[str, list[str]]:
    if "conversations" not in record:
        # A question record, which has no candidates yet, will do as well.
        test = parse_test_record({"candidates": [""], "true_false": [False], **record})
        return test.question, test.images
    parsed = parse_training_record(record)
    human = next(turn["value"] for turn in parsed.conversations if turn["from"] == "human")
    return human, parsed.images


def decontaminate_file(
    source: Path,
    against: list[Path],
    out: Path,
    *,
    image_root: Path | None = None,
    against_image_root: Path | None = None,
    checks: tuple[str, ...] = CHECKS,
    max_distance: int = MAX_DISTANCE,
    overwrite: bool = False,
) -> RecordWriter:
    """Write the records of ``source`` that touch no record of ``against``.

    The others, and those that cannot be read or compared, are listed in ``<out>.rejected.jsonl``.
    Image paths start from ``image_root`` (by default ``source``'s folder) and are rewritten so
    that they start from ``out``'s folder.

    Raises:
        FileNotFoundError: a file is missing.
        InputError: a record of ``against`` cannot be read, ``out`` is taken, or nothing is left.
    """
    if out.resolve() in {path.resolve() for path in (source, *against)}:
        raise InputError(f"{out}: this would overwrite an input; choose another name.")
    _fingerprint.cache_clear()  # an earlier call's images may have changed since
    protected = Protected(max_distance)
    root = source.parent if image_root is None else image_root
    prefix = image_prefix(root, out)
    with RecordWriter(out, overwrite) as writer:
        for path in against:
            protected.add_file(path, against_image_root)
        for line, raw in read_with_progress(source):
            try:
                record = require_object(raw)
                question, images = _question_and_images(record)
                reasons = []
                if "question" in checks and (place := protected.same_question(question)):
                    reasons.append(f"same question as {place}")
                needed = images if {"image", "lookalike"} & set(checks) else []
                for image in needed:
                    fingerprint = _fingerprint(str(root / image), image)
                    if "image" in checks and (place := protected.same_image(fingerprint)):
                        reasons.append(f"image {image!r} is that of {place}")
                    elif "lookalike" in checks and (place := protected.lookalike(fingerprint)):
                        reasons.append(f"image {image!r} looks like that of {place}")
                if reasons:
                    raise RecordError("; ".join(reasons))
            except RecordError as error:
                writer.reject(source, line, raw, str(error))
            else:
                writer.write(with_prefix(record, prefix))
    return writer


def main(argv: list[str] | None = None) -> None:
    """Command line: see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.decontaminate",
        description="Remove training records that share an image or a question with other files; "
        "each is listed with its reasons in <out>.rejected.jsonl.",
    )
    add = parser.add_argument
    add("source", type=Path, help="training records, JSONL or a JSON list")
    add("--against", type=Path, nargs="+", required=True, help="meta, test or question files")
    add("--image_root", type=Path, help="where paths start (default: the source's folder)")
    add(
        "--against_image_root",
        type=Path,
        help="where paths of --against start (default: each file's own folder)",
    )
    add("--checks", nargs="+", choices=CHECKS, default=CHECKS, help="(default: all)")
    add(
        "--max_distance",
        type=int,
        default=MAX_DISTANCE,
        help=f"most bits of {HASH_SIDE**2} that differ in a lookalike (default: {MAX_DISTANCE})",
    )
    add_output(parser)
    args = parser.parse_args(argv)
    writer = decontaminate_file(
        args.source,
        args.against,
        args.out,
        image_root=args.image_root,
        against_image_root=args.against_image_root,
        checks=tuple(args.checks),
        max_distance=args.max_distance,
        overwrite=args.overwrite,
    )
    print(writer.summary("records kept", "removed"))


if __name__ == "__main__":
    run(main)
