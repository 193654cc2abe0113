"""Remove training records that touch the meta or test set, and say why.

    python -m data_tools.decontaminate train.jsonl --against meta.jsonl test.jsonl --out clean.jsonl

A record touches another when it shares an image (equal bytes), when its image looks the same
(perceptual hash) or when it asks the same question (`data_tools.question_text`). Removed records
are listed in ``<out>.rejected.jsonl`` with every reason.
"""

from __future__ import annotations

import hashlib
import sys
from collections import Counter, defaultdict
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from data_tools.convert import convert_raw
from data_tools.question_text import QuestionIndex
from data_tools.record_files import (
    RecordWriter,
    add_limit,
    add_output,
    find_image,
    image_prefix,
    map_images,
    read_with_progress,
    with_prefix,
    with_source_id,
)
from dreamprm_dist.data.images import read_image
from dreamprm_dist.data.json_records import read_json_records
from dreamprm_dist.data.schema import (
    parse_question_record,
    parse_training_record,
    question_turn,
    require_object,
)
from dreamprm_dist.errors import InputError, RecordError
from dreamprm_dist.flags import CommandParser, run

CHECKS = ("image", "lookalike", "question")
UNREADABLE = "unreadable"
HASH_SIDE = 16  # 256 bits
# Bits of 256: re-encoded, resized copies of line drawings differ in up to about 20, a drawing with
# one corner moved by 3 % in 36 and more, unrelated ones in 80 to 150.
MAX_DISTANCE = 24
_FLAT = 2.0  # grey levels; below it a picture shows nothing that a hash could tell apart


class Fingerprint(NamedTuple):
    """Properties that copies of an image share.

    Attributes:
        digest: SHA-256 of the bytes.
        lookalike: (32,) uint8 perceptual hash; None for a flat image.
    """

    digest: bytes
    lookalike: np.ndarray | None


def perceptual_hash(image: Image.Image) -> np.ndarray | None:
    """The signs of an image's lowest frequencies, (32,) uint8; None for a flat image.

    pHash (Zauner, 2010) with 16 x 16 coefficients of the cosine transform of the 64 x 64 grey
    image, each against their median: re-encoding and resizing change few of the 256 bits.

    Args:
        image: a picture as `decode_image` gives it.
    """
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
        self._questions = QuestionIndex()
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
                questions, images = _questions_and_images(require_object(raw))
                paths = [find_image(image, root)[0] for image in images]
                prints = [_fingerprint(str(root / path), path) for path in paths]
            except RecordError as error:
                raise InputError(f"{where}: {error}") from error
            self._questions.add(questions[-1], where)
            for image in prints:
                if image.digest not in self._digests:
                    self._digests[image.digest] = where
                    if image.lookalike is not None:
                        self._hashes.append(image.lookalike)
                        self._places.append(where)
        self._table = np.array(self._hashes, dtype=np.uint8).reshape(-1, HASH_SIDE**2 // 8)

    def same_question(self, texts: list[str]) -> str | None:
        """The place of the protected question that one of a record's texts asks."""
        return self._questions.find(texts)

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


def _questions_and_images(record: dict) -> tuple[list[str], list[str]]:
    """The texts that hold a record's question, the barest one last, and its image paths."""
    if "steps_with_score" in record:  # raw VisualPRM
        record = convert_raw(record)
    if "conversations" not in record:
        asked = parse_question_record(record)
        return [asked.question], asked.images
    parsed = parse_training_record(record)
    original = record.get("question_orig")
    return [
        question_turn(parsed.conversations),
        *([original] if isinstance(original, str) else []),
    ], parsed.images


class Removals(NamedTuple):
    """What was removed, for whoever ran the command.

    Attributes:
        writer: with the counts of records kept and removed.
        num_records: of each data set, "" for those that name none.
        reasons: for each data set, how many records each check removed, and how many "any" did.
    """

    writer: RecordWriter
    num_records: Counter[str]
    reasons: dict[str, Counter[str]]

    def summary(self) -> str:
        """A line for all, and one for each data set that lost records."""
        lines = [self.writer.summary("records kept", "removed")]
        for name, reasons in sorted(self.reasons.items()):
            counts = ", ".join(f"{reasons[r]} {r}" for r in (*CHECKS, UNREADABLE) if reasons[r])
            removed = f"{reasons['any']} of {self.num_records[name]} removed"
            lines.append(f"{name or '(no data set)'}: {removed} ({counts})")
        return "\n".join(lines)

    def warnings(self) -> list[str]:
        """A sentence for each data set of which more than half is gone."""
        return [
            f"warning: more than half of {name or 'the records without a data set'} is removed; "
            "short questions repeat by chance: see the reasons, and whether --checks image "
            "lookalike is enough."
            for name, reasons in sorted(self.reasons.items())
            if 2 * reasons["any"] > self.num_records[name]
        ]


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
    limit: int | None = None,
) -> Removals:
    """Write the records of ``source``, or its first ``limit``, that touch no record of ``against``.

    The others, and those that cannot be read or compared, are listed in ``<out>.rejected.jsonl``.
    Image paths start from ``image_root`` (by default ``source``'s folder) and are rewritten so
    that they start from ``out``'s folder.

    Raises:
        FileNotFoundError: a file is missing.
        InputError: a record of ``against`` cannot be read, ``out`` is taken, or nothing is left.
    """
    _fingerprint.cache_clear()  # an earlier call's images may have changed since
    protected = Protected(max_distance)
    root = source.parent if image_root is None else image_root
    prefix = image_prefix(root, out)
    num_records: Counter[str] = Counter()
    removed: dict[str, Counter[str]] = defaultdict(Counter)
    with RecordWriter(out, overwrite, (source, *against)) as writer:
        for path in against:
            protected.add_file(path, against_image_root)
        for line, raw in read_with_progress(source, limit):
            dataset = str(raw.get("dataset") or "") if isinstance(raw, dict) else ""
            num_records[dataset] += 1
            try:
                record = map_images(require_object(raw), lambda path: find_image(path, root)[0])
                reasons = _reasons(record, root, protected, checks)
            except RecordError as error:
                reasons = {UNREADABLE: [str(error)]}
            if reasons:
                texts = [text for found in reasons.values() for text in found]
                writer.reject(source, line, raw, "; ".join(texts))
                removed[dataset].update(["any", *reasons])
            else:
                writer.write(with_prefix(with_source_id(record, source, line), prefix))
    return Removals(writer, num_records, removed)


def _reasons(
    record: dict, root: Path, protected: Protected, checks: tuple[str, ...]
) -> dict[str, list[str]]:
    """From each check that finds something to what it found; RecordError if it cannot be read."""
    questions, images = _questions_and_images(record)
    reasons: dict[str, list[str]] = defaultdict(list)
    if "question" in checks and (place := protected.same_question(questions)):
        reasons["question"].append(f"same question as {place}")
    for image in images if {"image", "lookalike"} & set(checks) else []:
        fingerprint = _fingerprint(str(root / image), image)
        if "image" in checks and (place := protected.same_image(fingerprint)):
            reasons["image"].append(f"image {image!r} is that of {place}")
        elif "lookalike" in checks and (place := protected.lookalike(fingerprint)):
            reasons["lookalike"].append(f"image {image!r} looks like that of {place}")
    return reasons


def main(argv: list[str] | None = None) -> None:
    """Command line: see ``--help``."""
    parser = CommandParser(
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
    add_limit(parser)
    add_output(parser)
    args = parser.parse_args(argv)
    removals = decontaminate_file(
        args.source,
        args.against,
        args.out,
        image_root=args.image_root,
        against_image_root=args.against_image_root,
        checks=tuple(args.checks),
        max_distance=args.max_distance,
        overwrite=args.overwrite,
        limit=args.limit,
    )
    print(removals.summary())
    for warning in removals.warnings():
        print(warning, file=sys.stderr)


if __name__ == "__main__":
    run(main)
