"""Reading image files from outside, which may be broken or hostile."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path

from PIL import Image

from dreamprm_dist.errors import RecordError

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
MAX_IMAGE_BYTES = 64 << 20  # 16 rows of one such image stay below Arrow's 2 GiB per column chunk


def read_image(path: str | Path, shown: str) -> tuple[bytes, Image.Image]:
    """An image file's bytes, and the image decoded.

    Args:
        shown: how the record names the image, for messages.

    Raises:
        RecordError: as `image_bytes` and `decode_image`.
    """
    data = image_bytes(path, shown)
    try:
        return data, decode_image(data)
    except RecordError as error:
        raise RecordError(f"image {shown!r}: {error}") from error


def image_bytes(path: str | Path, shown: str) -> bytes:
    """An image file's bytes, not looked at.

    Raises:
        RecordError: there is no such file, it is too large, or it cannot be read.
    """
    try:
        # A device or a pipe would never end; a sparse file would fill the memory.
        if not os.path.isfile(path):
            raise RecordError(f"image {shown!r}: no such file; correct the path or --image_root.")
        if os.path.getsize(path) > MAX_IMAGE_BYTES:
            raise RecordError(
                f"image {shown!r}: larger than {MAX_IMAGE_BYTES >> 20} MiB; make it smaller."
            )
        return Path(path).read_bytes()
    except OSError as error:
        raise RecordError(f"image {shown!r}: cannot be read ({error.strerror}).") from error


def decode_image(data: bytes, max_pixels: int = 64_000_000) -> Image.Image:
    """Decode an image in full.

    An EXIF orientation is not applied; of an animation only the first frame is decoded.

    Raises:
        RecordError: not JPEG, PNG, WEBP, BMP or GIF, truncated or broken, of zero size, or more
            than ``max_pixels`` pixels (refused from the header, before anything is decoded).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
            width, height = image.size
            if width < 1 or height < 1:
                raise RecordError(f"the image is {width}x{height}: it has no pixels.")
            if width * height > max_pixels:
                raise RecordError(
                    f"the image has too many pixels ({width}x{height}, more than "
                    f"{max_pixels:,}); make it smaller."
                )
            image.load()
            return image
    except RecordError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RecordError(
            f"the image has too many pixels (more than {max_pixels:,}); make it smaller."
        ) from error
    except Image.UnidentifiedImageError as error:
        raise RecordError(
            f"not an image in a supported format ({', '.join(IMAGE_FORMATS)}), or its header is "
            "damaged; convert or replace the file."
        ) from error
    # Pillow's decoders raise nearly anything on hostile bytes: OSError, SyntaxError, struct.error.
    except Exception as error:
        raise RecordError(
            f"the image is truncated or broken ({error}); replace the file."
        ) from error
