"""An image as a shard holds it: the file as it is when it is small enough, else made smaller."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from dreamprm_dist.data.images import REDRAWN, read_image
from dreamprm_dist.prm.grid import usable_size

ENCODING = 2  # another number wherever other bytes come out of the same image
MAX_TILES = 12  # the most that evaluation uses by default; training uses 6
KEPT_BYTES = 1 << 20
_JPEG_OPTIONS = {"format": "JPEG", "quality": 95, "subsampling": 0}


def shard_image(path: str | Path, shown: str) -> tuple[bytes, tuple[int, int]]:
    """A checked image file's bytes for a shard, and its (width, height) in pixels as it is seen.

    See `encoded`.

    Args:
        shown: how the record names the image, for messages.

    Raises:
        RecordError: see `read_image`.
    """
    return encoded(*read_image(path, shown))


def encoded(data: bytes, picture: Image.Image) -> tuple[bytes, tuple[int, int]]:
    """An image's bytes for a shard or a server, and its (width, height) in pixels as it is seen.

    A JPEG or PNG file is kept as it is when it has at most 1 MiB and at most twice the pixels
    that a tiling into `MAX_TILES` can use; an EXIF orientation stays in it. Else the picture is
    shrunk to what can be used, its tilings stay the same, and written as PNG where the file was
    PNG, GIF or BMP, as JPEG otherwise; where that saves nothing the JPEG or PNG file is kept after
    all. A file that readers show in different ways is never kept: one with transparent pixels, or
    with grey levels of 16 bits.

    Args:
        data, picture: as `read_image` gives them.
    """
    width, height = usable_size(*picture.size, MAX_TILES)
    may_be_kept = picture.format in ("JPEG", "PNG") and REDRAWN not in picture.info
    has_many_pixels = picture.width * picture.height > 2 * width * height
    if may_be_kept and not has_many_pixels and len(data) <= KEPT_BYTES:
        return data, picture.size
    # The colours are RGB already and the filter is that of tiling.
    smaller = picture.resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    lossless = picture.format in ("PNG", "GIF", "BMP")
    smaller.save(file, **({"format": "PNG"} if lossless else _JPEG_OPTIONS))
    if may_be_kept and not has_many_pixels and file.tell() >= len(data):
        return data, picture.size
    return file.getvalue(), smaller.size
