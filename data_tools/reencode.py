"""An image as a shard holds it: the file as it is when it is small enough, else made smaller."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from dreamprm_dist.data.images import read_image
from dreamprm_dist.prm.grid import usable_size

MAX_TILES = 12  # the most that evaluation uses by default; training uses 6
KEPT_BYTES = 1 << 20
_JPEG_OPTIONS = {"format": "JPEG", "quality": 95, "subsampling": 0}


def shard_image(path: str | Path, shown: str) -> tuple[bytes, tuple[int, int]]:
    """A checked image file's bytes for a shard, and its (width, height) in pixels there.

    A JPEG or PNG file is kept as it is when it has at most 1 MiB and at most twice the pixels
    that a tiling into `MAX_TILES` can use. Else the image is shrunk to what can be used, its
    tilings stay the same, and written as PNG where the file was PNG, GIF or BMP, as JPEG
    otherwise; where that saves nothing the JPEG or PNG file is kept after all.

    Args:
        shown: how the record names the image, for messages.

    Raises:
        RecordError: see `read_image`.
    """
    data, image = read_image(path, shown)
    width, height = usable_size(*image.size, MAX_TILES)
    is_kept_format = image.format in ("JPEG", "PNG")
    has_many_pixels = image.width * image.height > 2 * width * height
    if is_kept_format and not has_many_pixels and len(data) <= KEPT_BYTES:
        return data, image.size
    # To RGB first and by the same filter, as tiling does.
    smaller = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    lossless = image.format in ("PNG", "GIF", "BMP")
    smaller.save(file, **({"format": "PNG"} if lossless else _JPEG_OPTIONS))
    if is_kept_format and not has_many_pixels and file.tell() >= len(data):
        return data, image.size
    return file.getvalue(), smaller.size
