"""An image is what a person sees, against pixels written and turned by hand."""

import io
import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from picture_files import (
    CHANNELS,
    bmp,
    exif,
    gif,
    png,
    png_chunk,
    png_header,
    random_pixels,
    saved,
    webp_animation,
)
from PIL import Image

from dreamprm_dist.data.images import ON_WHITE, REDRAWN, as_seen, decode_image, read_image
from dreamprm_dist.errors import RecordError
from dreamprm_dist.prm.grid import num_tiles, tile_grid
from dreamprm_dist.prm.tiling import IMAGENET_MEAN, IMAGENET_STD, image_tiles

ROOT = Path(__file__).resolve().parents[2]
SIZE = (7, 5)  # height, width


def over_white(colours, alpha):
    """(height, width, 3) levels from 0 to 255, seen with opacity 0 to 1 before white."""
    alpha = np.broadcast_to(alpha, colours.shape[:2])[..., None]
    return colours * alpha + 255 * (1 - alpha)


def assert_shows(picture, expected, most=0.51):
    assert picture.mode == "RGB"
    pixels = np.asarray(picture).astype(float)
    assert pixels.shape == expected.shape
    assert np.abs(pixels - expected).max() <= most


# Bit depths and transparency in PNG files


@pytest.mark.parametrize(
    ("color_type", "depth"),
    [(0, 1), (0, 2), (0, 4), (3, 1), (3, 2), (3, 4), (3, 8)]
    + [(kind, depth) for kind in (0, 2, 4, 6) for depth in (8, 16)],
)
@pytest.mark.parametrize("with_key", [False, True])
@settings(max_examples=20)
@given(height=st.integers(1, 9), width=st.integers(1, 9), seed=st.integers(0, 999))
def test_png_of_every_kind(color_type, depth, with_key, height, width, seed):
    rng = np.random.default_rng(seed)
    top = 2**depth - 1
    samples = rng.integers(0, top + 1, (height, width, CHANNELS[color_type]))
    before, alpha = b"", 1
    if color_type in (4, 6):
        alpha = samples[..., -1] / top
        levels = samples[..., :-1] * 255 / top
    elif color_type == 3:
        palette = rng.integers(0, 256, (top + 1, 3))
        before = png_chunk(b"PLTE", palette.astype(np.uint8).tobytes())
        opacity = np.full(top + 1, 255)
        if with_key:  # it may have fewer entries than the palette
            opacity[: top // 2 + 1] = rng.integers(0, 256, top // 2 + 1)
            before += png_chunk(b"tRNS", opacity[: top // 2 + 1].astype(np.uint8).tobytes())
        levels, alpha = palette[samples[..., 0]], opacity[samples[..., 0]] / 255
    else:
        levels = samples * 255 / top
        if with_key:
            key = samples[0, 0]
            before = png_chunk(b"tRNS", key.astype(">u2").tobytes())
            alpha = (samples != key).any(axis=2).astype(float)
    levels = np.broadcast_to(levels, (height, width, 3))
    # Pillow cuts the lower half of 16 bits of a colour or of an opacity off.
    most = 0.51 if depth < 16 or color_type == 0 else 2.51
    picture = decode_image(png(samples, depth, color_type, before))
    assert_shows(picture, over_white(levels, alpha), most)
    assert (picture.info.get(REDRAWN) == ON_WHITE) == bool((np.asarray(alpha) < 0.9961).any())


def test_a_drawing_in_16_bits_keeps_its_levels():
    levels = np.linspace(0, 65535, 64).reshape(8, 8)
    assert len(np.unique(np.asarray(decode_image(png(levels[..., None], 16, 0))))) == 64


# Modes of Pillow images


def lab_colours(pixels):
    """sRGB levels of CIELAB (D50, as colour profiles have it; a and b are signed bytes)."""
    lightness, a, b = np.moveaxis(pixels, -1, 0).astype(float)
    f = (lightness * 100 / 255 + 16) / 116
    f = np.stack([f + (a - 128) / 500, f, f - (b - 128) / 200], axis=-1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * [0.9642, 1, 0.8249]
    to_rgb = np.linalg.inv(
        [[0.4360, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7139]]
    )
    linear = (xyz @ to_rgb.T).clip(0, 1)
    low = linear <= 0.0031308
    return 255 * np.where(low, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def hsv_colours(pixels):
    hue, saturation, value = np.moveaxis(pixels / 255.0, -1, 0)
    k = (np.array([5, 3, 1]) + hue[..., None] * 6) % 6
    part = np.minimum(k, 4 - k).clip(0, 1)
    return 255 * value[..., None] * (1 - saturation[..., None] * part)


def ycbcr_colours(pixels):
    y, cb, cr = np.moveaxis(pixels.astype(float), -1, 0)
    cb, cr = cb - 128, cr - 128
    return np.stack(
        [y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], axis=-1
    ).clip(0, 255)


def grey(levels):
    return np.repeat(levels.astype(float)[..., None], 3, axis=-1)


DEEP = np.random.default_rng(5).integers(0, 65536, SIZE)
DEEP[0, 0] = 65535
DEEP_GREY = grey(DEEP / 257)
FOUR = random_pixels(*SIZE, 4)
ALPHA = FOUR[..., 3] / 255
PREMULTIPLIED = (FOUR[..., :3] * ALPHA[..., None]).round().astype(np.uint8)
PALETTE = random_pixels(256, 3, seed=1)


def from_bytes(mode, pixels):
    return Image.frombytes(mode, SIZE[::-1], np.ascontiguousarray(pixels).tobytes())


def with_palette(mode, pixels):
    image = from_bytes(mode, pixels)
    image.putpalette(PALETTE.tobytes())
    return image


# Each mode: an image, the colours that it shows, and how far they may be off.
MODES = {
    "1": (Image.fromarray(FOUR[..., 0] > 99), grey((FOUR[..., 0] > 99) * 255), 0),
    "L": (from_bytes("L", FOUR[..., 0]), grey(FOUR[..., 0]), 0),
    "P": (with_palette("P", FOUR[..., 0]), PALETTE[FOUR[..., 0]], 0),
    "RGB": (from_bytes("RGB", FOUR[..., :3]), FOUR[..., :3], 0),
    "RGBX": (from_bytes("RGBX", FOUR), FOUR[..., :3], 0),
    "RGBA": (from_bytes("RGBA", FOUR), over_white(FOUR[..., :3], ALPHA), 0.51),
    "RGBa": (
        from_bytes("RGBa", np.dstack([PREMULTIPLIED, FOUR[..., 3]])),
        PREMULTIPLIED + 255 * (1 - ALPHA[..., None]),
        2,
    ),
    "LA": (
        from_bytes("LA", FOUR[..., [0, 3]]),
        over_white(grey(FOUR[..., 0]), ALPHA),
        0.51,
    ),
    "La": (
        from_bytes("La", np.dstack([PREMULTIPLIED[..., 0], FOUR[..., 3]])),
        grey(PREMULTIPLIED[..., 0]) + 255 * (1 - ALPHA[..., None]),
        2,
    ),
    "PA": (
        with_palette("PA", FOUR[..., [0, 3]]),
        over_white(PALETTE[FOUR[..., 0]], ALPHA),
        0.51,
    ),
    "CMYK": (
        from_bytes("CMYK", FOUR),
        (255.0 - FOUR[..., :3]) * (255.0 - FOUR[..., 3:]) / 255,
        1,
    ),
    "YCbCr": (from_bytes("YCbCr", FOUR[..., :3]), ycbcr_colours(FOUR[..., :3]), 2),
    "HSV": (from_bytes("HSV", FOUR[..., :3]), hsv_colours(FOUR[..., :3]), 3),
    "I": (Image.fromarray(DEEP.astype(np.int32)), DEEP_GREY, 0.51),
    "F": (Image.fromarray(DEEP.astype(np.float32)), DEEP_GREY, 0.51),
    "I;16": (from_bytes("I;16", DEEP.astype("<u2")), DEEP_GREY, 0.51),
    "I;16L": (from_bytes("I;16L", DEEP.astype("<u2")), DEEP_GREY, 0.51),
    "I;16B": (from_bytes("I;16B", DEEP.astype(">u2")), DEEP_GREY, 0.51),
    "I;16N": (from_bytes("I;16N", DEEP.astype("=u2")), DEEP_GREY, 0.51),
}


@pytest.mark.parametrize("mode", sorted(set(Image.MODES) - {"LAB"}))
def test_every_mode_of_pillow(mode):
    image, expected, most = MODES[mode]
    assert image.mode == mode
    before = image.tobytes()
    picture = as_seen(image)
    assert_shows(picture, expected, most)
    assert image.tobytes() == before
    assert as_seen(picture) is picture


def test_cielab():
    colours = random_pixels(*SIZE, 3)
    pixels = np.full((*SIZE, 3), 128, np.uint8)  # greys; and a few colours that sRGB has
    pixels[..., 0] = colours[..., 0]
    pixels[0, :3] = [(138, 158, 140), (200, 110, 150), (120, 135, 100)]
    bands = pixels ^ [0, 128, 128]  # what is written out is signed
    assert_shows(as_seen(from_bytes("LAB", bands.astype(np.uint8))), lab_colours(pixels), 4)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.fromarray(np.array([[0, 100, 255]], np.int32)), [0, 100, 255]),
        (Image.fromarray(np.array([[0, 100, 256]], np.int32)), [0, 100 / 257, 256 / 257]),
        (Image.fromarray(np.array([[0, 0.25, 1]], np.float32)), [0, 63.75, 255]),
        (Image.fromarray(np.array([[0, 1.5, 255]], np.float32)), [0, 1.5, 255]),
        (Image.fromarray(np.array([[0, 255, 65535]], np.uint16)), [0, 255 / 257, 255]),
        (Image.fromarray(np.array([[7, 9, 200]], np.uint16)), [7 / 257, 9 / 257, 200 / 257]),
    ],
)
def test_which_grey_is_white(image, expected):
    assert_shows(as_seen(image), grey(np.array([expected])))


@pytest.mark.parametrize("levels", [[-1.0, 5], [np.nan, 5], [0, np.inf], [0, 65536], [-np.inf, 0]])
def test_levels_that_are_no_brightness_are_refused(levels):
    with pytest.raises(RecordError, match=r"mode F go from .* scale them to 0 to 255"):
        as_seen(Image.fromarray(np.array([levels], np.float32)))


def test_palettes_with_transparency():
    indices = FOUR[..., 0]
    opacity = random_pixels(256, seed=2)
    expected = over_white(PALETTE[indices], opacity[indices] / 255)
    image = from_bytes("P", indices)
    image.putpalette(np.column_stack([PALETTE, opacity]).tobytes(), "RGBA")
    assert_shows(as_seen(image), expected)
    image = with_palette("P", indices)
    image.info["transparency"] = opacity.tobytes()
    assert_shows(as_seen(image), expected)
    image = with_palette("P", indices)
    image.info["transparency"] = int(indices[0, 0])
    expected = over_white(PALETTE[indices], (indices != indices[0, 0]).astype(float))
    assert_shows(as_seen(image), expected)


# Transparency in the other formats


def test_transparent_webp():
    data = saved(FOUR, "WEBP", lossless=True, exact=True)
    assert_shows(decode_image(data), over_white(FOUR[..., :3], ALPHA))


@pytest.mark.parametrize(
    ("masks", "order"),
    [
        ((0xFF0000, 0xFF00, 0xFF, 0xFF000000), [2, 1, 0, 3]),
        ((0xFF, 0xFF00, 0xFF0000, 0xFF000000), [0, 1, 2, 3]),
    ],
)
def test_bmp_with_a_fourth_channel(masks, order):
    stored = np.ascontiguousarray(FOUR[..., order])
    assert_shows(decode_image(bmp(stored, masks)), over_white(FOUR[..., :3], ALPHA))
    stored[..., 3] = 0  # filler
    assert_shows(decode_image(bmp(stored, masks)), FOUR[..., :3])
    if order[0] == 2:
        assert_shows(decode_image(bmp(stored)), FOUR[..., :3])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "La", "RGBa"])
def test_what_could_be_transparent_and_is_not_is_left_alone(mode):
    colours = PALETTE[FOUR[..., 0]] if mode == "PA" else FOUR[..., :3]
    opaque = np.full((*SIZE, 1), 255, np.uint8)
    if "L" in mode:
        colours = FOUR[..., [0, 0, 0]]
    bands = np.dstack([FOUR[..., :3] if "RGB" in mode else FOUR[..., :1], opaque])
    picture = as_seen((with_palette if mode == "PA" else from_bytes)(mode, bands))
    assert REDRAWN not in picture.info
    assert_shows(picture, colours, 0)


# First frames of animations


@pytest.mark.parametrize("transparent", [None, 1])
@pytest.mark.parametrize("at", [(0, 0), (2, 1), (3, 4)])
def test_the_first_frame_of_a_gif(transparent, at):
    indices = random_pixels(3, 4, most=3)
    left, top = at
    opaque = np.zeros((8, 9))
    opaque[top : top + 3, left : left + 4] = 1 if transparent is None else indices != transparent
    colours = np.zeros((8, 9, 3))
    colours[top : top + 3, left : left + 4] = PALETTE[indices]
    data = gif(indices, PALETTE.tobytes(), (9, 8), at, transparent, more=[3 - indices])
    assert_shows(decode_image(data), over_white(colours, opaque))
    assert_shows(as_seen(Image.open(io.BytesIO(data))), over_white(colours, opaque))


@pytest.mark.parametrize("color_type", [0, 2, 4, 6])
def test_the_first_frame_of_a_png(color_type):
    channels = CHANNELS[color_type]
    own, first = random_pixels(8, 9, channels), random_pixels(8, 9, channels, seed=1)

    def shown(samples, at=(0, 0)):
        colours, opaque = np.zeros((8, 9, 3)), np.zeros((8, 9))
        place = np.s_[at[1] : at[1] + len(samples), at[0] : at[0] + samples.shape[1]]
        colours[place] = samples[..., : 1 + 2 * (channels > 2)]
        opaque[place] = samples[..., -1] / 255 if color_type > 3 else 1
        return over_white(colours, opaque)

    # The file's own pixels are its first frame, or stand in for an animation that some cannot show.
    data = png(own, color_type=color_type, frames=[None, (first, 0, 0)])
    assert_shows(decode_image(data), shown(own))
    data = png(own, color_type=color_type, frames=[(first, 0, 0), (own, 0, 0)])
    assert_shows(decode_image(data), shown(first))
    data = png(own, color_type=color_type, frames=[(first[:3, :4], 2, 1), (own, 0, 0)])
    assert_shows(decode_image(data), shown(first[:3, :4], (2, 1)))
    assert REDRAWN in decode_image(data).info
    data = png(own, color_type=color_type, before=png_chunk(b"acTL", b"\0\0\0\1\0\0\0\0"))
    assert_shows(decode_image(data), shown(own))  # an animation without a frame


@pytest.mark.parametrize(("channels", "alpha"), [(3, False), (3, True), (4, True)])
@pytest.mark.parametrize("at", [(0, 0), (2, 4)])
def test_the_first_frame_of_a_webp(channels, alpha, at):
    frame = random_pixels(4, 6, channels)
    colours, opaque = np.zeros((8, 10, 3)), np.zeros((8, 10))
    place = np.s_[at[1] : at[1] + 4, at[0] : at[0] + 6]
    colours[place], opaque[place] = frame[..., :3], frame[..., 3] / 255 if channels == 4 else 1
    data = webp_animation([frame, 255 - frame], (10, 8), at, alpha)
    assert_shows(decode_image(data), over_white(colours, opaque))


# Orientation

# Where the first stored row and the first stored column are seen (EXIF 2.3, tag 274).
SIDES = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


def turned(stored, orientation):
    sides = SIDES[orientation]
    pixels = stored if sides[0] in ("top", "bottom") else stored.swapaxes(0, 1)
    if "bottom" in sides:
        pixels = pixels[::-1]
    return pixels[:, ::-1] if "right" in sides else pixels


@pytest.mark.parametrize("endian", ["<", ">"])
@pytest.mark.parametrize("orientation", SIDES)
@pytest.mark.parametrize(
    ("format", "channels", "options"),
    [
        ("JPEG", 3, {"quality": 95}),
        ("JPEG", 1, {}),
        ("MPO", 3, {"save_all": True, "append_images": [Image.new("RGB", (100, 48))]}),
        ("PNG", 3, {}),
        ("PNG", 4, {}),
        ("PNG", 1, {}),
        ("WEBP", 3, {"lossless": True}),
        ("WEBP", 4, {"lossless": True, "exact": True}),
    ],
)
def test_orientations(format, channels, options, orientation, endian):
    pixels = random_pixels(48, 100, channels)
    pixels = pixels[..., 0] if channels == 1 else pixels
    flat = np.asarray(decode_image(saved(pixels, format, **options))).astype(float)
    data = saved(pixels, format, **options, exif=exif(orientation, endian))
    picture = decode_image(data)
    assert_shows(picture, turned(flat, orientation), 0)
    assert as_seen(picture) is picture  # it is not turned again
    assert_shows(as_seen(Image.open(io.BytesIO(data))), turned(flat, orientation), 0)
    assert picture.size == ((100, 48) if orientation < 5 else (48, 100))
    upright = image_tiles(saved(turned(flat, orientation).astype(np.uint8), "PNG"), 6, 32)
    tiles = image_tiles(data, 6, 32)
    assert len(tiles) == num_tiles(*picture.size, 6, 32)
    assert (tiles == upright).all()


def test_an_orientation_behind_the_pixels_of_a_png():
    pixels = random_pixels(4, 9, 3)
    data = png(pixels)
    chunk = png_chunk(b"eXIf", exif(6)[6:])
    assert_shows(decode_image(data[:-12] + chunk + data[-12:]), turned(pixels, 6), 0)


@pytest.mark.parametrize(
    "tag",
    [
        *(exif(orientation) for orientation in (0, 9, 300)),
        exif(6)[:20],
        exif(6)[:-10] + b"\xff" * 10,
        b"Exif\0\0",
        b"Exif\0\0junk",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12" * 40,
    ],
)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.filterwarnings("error")
def test_a_broken_tag_turns_nothing(format, tag):
    pixels = random_pixels(4, 9, 3)
    options = {"lossless": True} if format == "WEBP" else {}
    flat = np.asarray(decode_image(saved(pixels, format, **options)))
    assert_shows(decode_image(saved(pixels, format, **options, exif=tag)), flat, 0)


# Ordinary images stay what they were


@pytest.mark.parametrize(
    ("format", "mode"),
    [("JPEG", "CMYK")]
    + [(f, m) for f in ("JPEG", "PNG", "BMP", "WEBP", "GIF") for m in ("RGB", "L", "1")]
    + [(f, "P") for f in ("PNG", "BMP", "WEBP", "GIF")],
)
def test_an_opaque_image_gives_the_pixels_of_pillows_conversion(format, mode):
    data = saved(Image.fromarray(random_pixels(30, 40, 3)).convert(mode), format)
    plain = Image.open(io.BytesIO(data)).convert("RGB")
    picture = decode_image(data)
    assert picture.tobytes() == plain.tobytes()
    assert REDRAWN not in picture.info and picture.format == format
    grid = tile_grid(*plain.size, 6, 16)
    canvas = plain.resize((grid[0] * 16, grid[1] * 16), Image.Resampling.BICUBIC)
    first = np.asarray(canvas)[:16, :16].astype(np.float32) / np.float32(255)
    first = (first - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)
    assert (image_tiles(data, 6, 16)[0].numpy() == first.transpose(2, 0, 1)).all()


# What is no image


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "but an empty file"),
        (bytes(500), "but a file of zeros or blanks"),
        (b"II*\0\x08\0\0\0", "but a TIFF file"),
        (b"MM\0*\0\0\0\x08", "but a TIFF file"),
        (b"\0\0\0\x1cftypavif\0\0\0\0", "but an AVIF file"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "but a HEIC file"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0", "but a HEIC file"),
        (b"\0\0\0\x20ftypisom\0\0\2\0", "but a video"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "but an SVG drawing"),
        (b"\xef\xbb\xbf<?xml version='1.0'?>\n<!-- x -->\n<svg/>", "but an SVG drawing"),
        (b"<?xml version='1.0'?>\n<feed/>", "but an XML file"),
        (b"\n <!DOCTYPE html>\n<html>" + "é".encode() * 2000, "but an HTML page"),
        (b"%PDF-1.7\n%\xe2\xe3", "but a PDF document"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "but a Git LFS pointer"),
        (b'{"detail": "Not found"}', "but a text file"),
        ("ein Text, è così\n".encode() * 200, "but a text file"),
        (b"\0\0\1\0\1\0", "but an icon (ICO)"),
        (b"8BPS\0\1", "but a Photoshop file"),
        (b"P6\n2 2\n255\n", "but a PNM file"),
        (b"\x93NUMPY\1\0", "but a NumPy array"),
        (b"PK\3\4\x14", "but a ZIP archive"),
        (b"\x1f\x8b\x08", "but a gzip file"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "but a JPEG 2000 file"),
        (b"\xff\x0a\xfa", "but a JPEG XL file"),
        (b"\x07\xff\xfe\x80" * 400, "or its header is damaged"),
        (b"\x89PNG\r\n\x1a\n\0\0", "the header of this PNG file is truncated or broken"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF", "truncated or broken"),
        (b"GIF89a\1\0", "the header of this GIF file is truncated or broken"),
        (b"BM\0\0", "the header of this BMP file is truncated or broken"),
        (b"RIFF\x10\0\0\0WEBPVP8X", "truncated or broken"),
        (b"RIFF\x10\0\0\0WEBPVP", "the header of this WEBP file is truncated or broken"),
    ],
)
def test_what_stands_in_an_images_place_is_named(data, what, tmp_path):
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(RecordError, match=re.escape(what)) as refused:
        read_image(tmp_path / "a.png", "a.png")
    assert "\n" not in str(refused.value) and str(refused.value).startswith("image 'a.png': ")


def test_paths_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, what in {
        ".": "is a folder",
        "pipe": "is a device or pipe",
        "nothing.png": "no such file",
        "link": "no such file",
        "a\0.png": "no such file",
        "file/a.png": r"cannot be read \(Not a directory\)",
        "x" * 5000: r"cannot be read \(File name too long\)",
    }.items():
        with pytest.raises(RecordError, match=what):
            read_image(tmp_path / name, "shown")


def test_pillow_images_that_cannot_be_taken():
    with pytest.raises(RecordError, match="no pixels"):
        as_seen(Image.new("RGB", (0, 5)))
    with pytest.raises(RecordError, match="too many pixels"):
        as_seen(Image.new("1", (9000, 8000)))
    file = io.BytesIO(png_header(9000, 8000) + png_chunk(b"IDAT", b""))
    with pytest.raises(RecordError, match="too many pixels"):  # and not that it is truncated
        as_seen(Image.open(file))


@given(st.binary(max_size=200), st.sampled_from(["png", "gif", "webp", "bmp"]), st.integers(0, 150))
def test_damage_ends_in_a_picture_or_a_sentence(noise, kind, place):
    whole = {
        "png": png(FOUR, color_type=6, frames=[(FOUR[:3], 0, 1)]),
        "gif": gif(FOUR[..., 0] % 4, PALETTE.tobytes(), (9, 9), (1, 1), 2),
        "webp": webp_animation([FOUR], (8, 8), (2, 0), True),
        "bmp": bmp(FOUR, (0xFF0000, 0xFF00, 0xFF, 0xFF000000)),
    }[kind]
    data = whole[:place] + noise + whole[place + len(noise) :]
    try:
        assert decode_image(data, max_pixels=10_000).mode == "RGB"
    except RecordError as error:
        assert str(error)


def test_one_file_makes_pictures_of_images():
    makers = {
        str(file.relative_to(ROOT))
        for folder in ("dreamprm_dist", "data_tools", "launch")
        for file in (ROOT / folder).rglob("*.py")
        if re.search(
            r"Image\.open\(|convert\(\"RGB|alpha_composite|exif_transpose", file.read_text()
        )
    }
    assert makers == {"dreamprm_dist/data/images.py"}
