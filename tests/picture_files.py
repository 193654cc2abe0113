"""Image files of which tests know the pixels without an image library: most by the byte."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a PNG's colour types


def saved(pixels, format, **options):
    """What Pillow writes of pixels or of its own image."""
    file = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file, format, **options)
    return file.getvalue()


def random_pixels(*shape, most=255, seed=0):
    """Levels from 0 to ``most``, the same ones each time."""
    return np.random.default_rng(seed).integers(0, most + 1, shape).astype(np.uint8)


def exif(orientation, endian="<"):
    """EXIF data with nothing but an orientation."""
    head = b"II*\0\x08\0\0\0" if endian == "<" else b"MM\0*\0\0\0\x08"
    return b"Exif\0\0" + head + struct.pack(f"{endian}HHHIHHI", 1, 274, 3, 1, orientation, 0, 0)


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_header(width: int, height: int, depth: int = 8, color_type: int = 2) -> bytes:
    """How a PNG file begins."""
    head = struct.pack(">IIBB3x", width, height, depth, color_type)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", head)


def _scanlines(samples: np.ndarray, depth: int) -> bytes:
    if depth == 16:
        rows = [row.astype(">u2").tobytes() for row in samples]
    else:
        bits = np.unpackbits(samples.astype(np.uint8)[..., None], axis=-1)[..., 8 - depth :]
        rows = [np.packbits(row).tobytes() for row in bits.reshape(len(samples), -1)]
    return zlib.compress(b"".join(b"\0" + row for row in rows))


def png(samples, depth=8, color_type=2, before=b"", frames=()):
    """A PNG file of (height, width, channels) samples, each from 0 to 2**depth - 1.

    Args:
        before: whole chunks in front of the pixels.
        frames: those of an animation, each as ``(samples, left, top)``; the first one may be None,
            which stands for the file's own pixels.
    """
    height, width = samples.shape[:2]
    parts = [png_header(width, height, depth, color_type), before]
    number = 0

    def control(width, height, left, top):
        nonlocal number
        body = struct.pack(">5I2H2B", number, width, height, left, top, 1, 10, 0, 1)
        number += 1
        return png_chunk(b"fcTL", body)

    if frames:
        parts.append(png_chunk(b"acTL", struct.pack(">II", len(frames), 0)))
    if frames and frames[0] is None:
        parts.append(control(width, height, 0, 0))
    parts.append(png_chunk(b"IDAT", _scanlines(samples, depth)))
    for frame in frames:
        if frame is not None:
            pixels, left, top = frame
            parts.append(control(pixels.shape[1], pixels.shape[0], left, top))
            body = struct.pack(">I", number) + _scanlines(pixels, depth)
            number += 1
            parts.append(png_chunk(b"fdAT", body))
    return b"".join([*parts, png_chunk(b"IEND", b"")])


def bmp(pixels, masks=None):
    """A BMP file of (height, width, 4) samples of 32 bits; with ``masks`` one of version 4."""
    height, width = pixels.shape[:2]
    head = struct.pack("<IiiHHIIiiII", 108 if masks else 40, width, -height, 1, 32, 3 * bool(masks),
                       pixels.nbytes, 0, 0, 0, 0)  # fmt: skip
    if masks:
        head += struct.pack("<4I", *masks) + bytes(52)
    start = 14 + len(head)
    return (
        b"BM" + struct.pack("<IHHI", start + pixels.nbytes, 0, 0, start) + head + pixels.tobytes()
    )


def gif(indices, palette, screen, at=(0, 0), transparent=None, more=()):
    """A GIF file whose first frame of (height, width) indices lies at ``at`` of a larger screen."""
    frames = [Image.fromarray(np.asarray(i, dtype=np.uint8), "L") for i in (indices, *more)]
    parts = []
    for frame in frames:
        frame.putpalette(palette)
        file = io.BytesIO()
        frame.save(file, "GIF", optimize=False)
        data = file.getvalue()
        size = 13 + (3 << ((data[10] & 7) + 1)) * (data[10] >> 7)
        start = data.index(b",", size)
        place = struct.pack("<HHHH", *at, *frame.size)
        body = data[start:-1]
        flags = int(transparent is not None)
        control = struct.pack("<4BHBB", 0x21, 0xF9, 4, flags, 10, transparent or 0, 0)
        parts.append(control + b"," + place + body[9:])
        if len(parts) == 1:
            head = b"GIF89a" + struct.pack("<HH", *screen) + data[10:size]
    return head + b"".join(parts) + b";"


def webp_animation(frames, screen, at=(0, 0), alpha=False):
    """A WEBP file whose frames, of (height, width, 3 or 4) pixels, lie at even places."""

    def chunk(name, body):
        return name + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)

    def u24(number):
        return struct.pack("<I", number)[:3]

    body = chunk(
        b"VP8X", bytes([0x02 | 0x10 * alpha, 0, 0, 0]) + b"".join(u24(n - 1) for n in screen)
    )
    body += chunk(b"ANIM", bytes(6))
    for pixels in frames:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "WEBP", lossless=True, exact=True)
        place = (at[0] // 2, at[1] // 2, pixels.shape[1] - 1, pixels.shape[0] - 1, 100)
        body += chunk(b"ANMF", b"".join(map(u24, place)) + b"\0" + file.getvalue()[12:])
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body
