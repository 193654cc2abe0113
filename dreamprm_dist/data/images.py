"""Image files from outside, which may be broken or hostile, and the picture that one sees."""

from __future__ import annotations

import io
import os
import stat
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image
from PIL.PngImagePlugin import Blend, PngImageFile

from dreamprm_dist.data.file_kinds import kind_of_file
from dreamprm_dist.errors import RecordError

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
MAX_IMAGE_BYTES = 64 << 20  # 16 rows of one such image stay below Arrow's 2 GiB per column chunk
MAX_PIXELS = 64_000_000
# Key of a picture's `info`, and what other programs may not do with the file to see the same.
REDRAWN = "redrawn"
ON_WHITE, IN_8_BITS, FIRST_FRAME = "on white", "in 8 bits", "the first frame of the animation"
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Pillow scales a PNG's samples to 8 bits, but not the colour that the file calls transparent.
_KEY_SCALES = {"L;2": 255 / 3, "L;4": 255 / 15, "RGB;16B": 1 / 256}
_WEBP_ANIMATION, _WEBP_ALPHA = 0x02, 0x10  # of the header's flags
# Levels that may be white in modes that do not say which one is; in the others of 16 bits it is
# their highest.
_WHITE_LEVELS = {"I": (255, 65535), "F": (1, 255, 65535)}


def read_image(path: str | Path, shown: str) -> tuple[bytes, Image.Image]:
    """An image file's bytes, and the picture in it.

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
        status = os.stat(path)
        # A device or a pipe would never end; a sparse file would fill the memory.
        if not stat.S_ISREG(status.st_mode):
            what = "a folder" if stat.S_ISDIR(status.st_mode) else "a device or pipe"
            raise RecordError(f"image {shown!r}: is {what}; give the path of an image file.")
        if status.st_size > MAX_IMAGE_BYTES:
            raise RecordError(
                f"image {shown!r}: larger than {MAX_IMAGE_BYTES >> 20} MiB; make it smaller."
            )
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise RecordError(
            f"image {shown!r}: no such file; correct the path or --image_root."
        ) from error
    except OSError as error:
        raise RecordError(f"image {shown!r}: cannot be read ({error.strerror}).") from error
    except RecordError:
        raise
    except ValueError as error:  # a path that no file can have
        raise RecordError(f"image {shown!r}: no such file ({error}).") from error


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture in an encoded image, as `as_seen` gives it; of an animation its first frame.

    Its `format` is that of the file.

    Raises:
        RecordError: not JPEG, PNG, WEBP, BMP or GIF, truncated or broken, of zero size, or more
            than ``max_pixels`` pixels (refused from the header, before anything is decoded).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of EXIF data and the like: what matters is refused
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(_with_alpha(data)), formats=IMAGE_FORMATS)
            _check_size(image, max_pixels)
            if isinstance(image, PngImageFile) and image.default_image and b"fdAT" in data:
                image.seek(1)  # what stands first in the file is no frame of its animation
                image.blend_op = Blend.OP_SOURCE
            picture = as_seen(image, max_pixels)
            picture.format = image.format
            if image.tell():
                picture.info.setdefault(REDRAWN, FIRST_FRAME)
            return picture
    except RecordError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RecordError(
            f"the image has too many pixels (more than {max_pixels:,}); make it smaller."
        ) from error
    except Image.UnidentifiedImageError as error:
        raise RecordError(_why_no_image(data)) from error
    # Pillow's decoders raise nearly anything on hostile bytes: OSError, SyntaxError, struct.error.
    except Exception as error:
        raise RecordError(
            f"the image is truncated or broken ({error}); replace the file."
        ) from error


def _with_alpha(data: bytes) -> bytes:
    """The file; an animated WEBP that says it is opaque as one that may be transparent.

    What the first frame of such a file leaves out would be black.
    """
    if data[8:16] != b"WEBPVP8X" or not data[20:21] or not data[20] & _WEBP_ANIMATION:
        return data
    return data[:20] + bytes([data[20] | _WEBP_ALPHA]) + data[21:]


def as_seen(image: Image.Image, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture that a person sees of an image in any mode: RGB, upright, on white.

    Everything that shows an image to a model takes it from here. Transparent pixels, and what the
    first frame of an animation leaves out, lie on white; the EXIF orientation is applied; grey
    levels of more than 8 bits are scaled to 8. Modes I and F do not say which level is white: it
    is the lowest of 255 and 65535 (for F also 1) that no pixel exceeds. Colour profiles are not
    applied. An image that needs nothing is returned itself.

    Returns:
        The picture; its `info` has `ON_WHITE` or `IN_8_BITS` under `REDRAWN` where pixels are other
        than by Pillow's plain conversion.

    Raises:
        RecordError: zero size, more than ``max_pixels`` pixels, or grey levels that are no
            brightness. Where the image is still to be read from its file, what Pillow raises.
    """
    _check_size(image, max_pixels)
    key = _transparent_key(image)
    image.load()
    picture, opaque = _colours_and_opacity(image, key)
    opaque = _within_frame(image, opaque)
    if opaque is not None and opaque.getextrema()[0] != 255:
        colours, picture = picture, Image.new("RGB", image.size, "white")
        picture.paste(colours, mask=opaque)
        picture.info[REDRAWN] = ON_WHITE
    elif picture.mode != "RGB":
        picture = picture.convert("RGB")
    turn = _TURNS.get(_orientation(image))
    if turn is not None:
        redrawn, picture = picture.info.get(REDRAWN), picture.transpose(turn)
        picture.info = {REDRAWN: redrawn} if redrawn else {}  # without the tag
    return picture


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise RecordError(f"the image is {width}x{height}: it has no pixels.")
    if width * height > max_pixels:
        raise RecordError(
            f"the image has too many pixels ({width}x{height}, more than {max_pixels:,}); "
            "make it smaller."
        )


def _transparent_key(image: Image.Image) -> np.ndarray | None:
    """The one grey level or colour that is transparent, as the decoded pixels will have it.

    Only an image that is not loaded yet says how deep the file's samples are.
    """
    key = image.info.get("transparency")
    if key is None or not (image.mode in ("1", "L", "RGB") or image.mode.startswith("I")):
        return None
    tiles = getattr(image, "tile", None) if image.format == "PNG" else None
    return np.floor(np.asarray(key) * _KEY_SCALES.get(tiles[0].args if tiles else "", 1))


def _colours_and_opacity(
    image: Image.Image, key: np.ndarray | None
) -> tuple[Image.Image, Image.Image | None]:
    """An image whose RGB are the colours, and where it is opaque (0 to 255); None: everywhere."""
    if image.mode.startswith("I") or image.mode == "F":
        levels = np.asarray(image)
        picture = Image.fromarray(_brightness(levels, image.mode)).convert("RGB")
        picture.info[REDRAWN] = IN_8_BITS
        return picture, None if key is None else Image.fromarray(levels != key)
    if key is not None:
        picture = image.convert("RGB")
        return picture, Image.fromarray((np.asarray(picture) != key).any(axis=2))
    if not image.has_transparency_data:
        return image, None
    # There is no direct way from La.
    rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    opaque = rgba.getchannel("A")
    # As browsers do: many programs leave the fourth byte of a BMP's pixels at 0.
    is_filler = image.format == "BMP" and opaque.getextrema() == (0, 0)
    return rgba, None if is_filler else opaque


def _brightness(levels: np.ndarray, mode: str) -> np.ndarray:
    whites = _WHITE_LEVELS.get(mode, (65535,))
    low, high = levels.min(), levels.max()
    white = next((white for white in whites if high <= white), None)
    if white is None or low < 0:  # NaN exceeds every level
        raise RecordError(
            f"the grey levels of this image of mode {mode} go from {low} to {high}, and which of "
            "them is white is not clear; scale them to 0 to 255."
        )
    return (np.multiply(levels, 255 / white, dtype=np.float32) + 0.5).astype(np.uint8)


def _within_frame(image: Image.Image, opaque: Image.Image | None) -> Image.Image | None:
    """Opacity that is 0 outside the first frame of an animation, which need not fill the image."""
    box = getattr(image, "dispose_extent", None)  # of GIF and PNG files
    is_first = image.tell() == getattr(image, "default_image", False)
    if not is_first or box is None or box == (0, 0, *image.size):
        return opaque
    drawn = Image.new("L", image.size)
    drawn.paste(255 if opaque is None else opaque.crop(box), box)
    return drawn


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # what viewers do not understand they do not apply
        return None


def _why_no_image(data: bytes) -> str:
    kind = kind_of_file(data)
    if kind in IMAGE_FORMATS:
        return f"the header of this {kind} file is truncated or broken; replace the file."
    what = f" but {kind}" if kind else ", or its header is damaged"
    return (
        f"not an image in a supported format ({', '.join(IMAGE_FORMATS)}){what}; convert or "
        "replace the file."
    )
