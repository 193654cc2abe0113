"""One definition of a question, for sharding and evaluation: which solutions belong together."""

from __future__ import annotations

import hashlib
from pathlib import Path

from dreamprm_dist.data.images import image_bytes
from dreamprm_dist.data.schema import SOLUTION_MARK, TrainingRecord, question_turn

NO_ID = ("", "-1")  # VisualPRM writes -1


def question_key(record: TrainingRecord, image_root: Path) -> str:
    """A text that records have in common when they are solutions of one question.

    The id where there is one; else SHA-256 of the question's text and of its image files' bytes,
    as they are on disk and wherever they lie there.

    Args:
        image_root: where the record's image paths start.

    Raises:
        RecordError: an image file that counts cannot be read.
    """
    if record.source_id not in NO_ID:
        return f"id {record.source_id}"
    digest = hashlib.sha256(question_text(record).encode("utf-8"))
    for image_digest in image_digests(record, image_root):
        digest.update(image_digest)
    return digest.hexdigest()


def question_text(record: TrainingRecord) -> str:
    """The first human turn, without a first step that stands in it too."""
    return question_turn(record.conversations).partition(SOLUTION_MARK)[0].strip()


def image_digests(record: TrainingRecord, image_root: Path) -> list[bytes]:
    """SHA-256 of each image file of a record; RecordError where one cannot be read."""
    return [
        hashlib.sha256(image_bytes(image_root / image, image)).digest() for image in record.images
    ]
