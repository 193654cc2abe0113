"""Images in shards: kept as they are, or made smaller without a change for the tiling."""

import io
import json

import numpy as np
import pytest
from picture_files import exif, gif, png, png_chunk, random_pixels, saved
from PIL import Image

import data_tools.reencode as reencode
import data_tools.shard_pieces as pieces
from data_tools.reencode import KEPT_BYTES, shard_image
from data_tools.shard import main, shard_file
from dreamprm_dist.data.images import as_seen, decode_image, read_image
from dreamprm_dist.data.shards import REJECTED, ShardFolder
from dreamprm_dist.errors import RecordError
from dreamprm_dist.prm.tiling import image_tiles


def drawing(width, height, mode="RGB"):
    """Smooth shapes with a few sharp edges, as photographs and diagrams have them."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    waves = [np.sin(9 * x + 5 * y), np.cos(7 * x * y), np.where((3 * x + y) % 1 > 0.5, 1, -1)]
    pixels = np.stack([(wave + 1) * 127 for wave in waves], axis=-1).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def save(path, image, **options):
    image.save(path, **options)
    return path


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
@pytest.mark.parametrize("size", [(10, 8), (640, 480), (1600, 1200), (60_000, 20)])
def test_small_files_are_kept(tmp_path, name, size):
    path = save(tmp_path / name, drawing(*size))
    assert shard_image(path, name) == (path.read_bytes(), size)


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
@pytest.mark.parametrize(
    ("size", "most", "kept"),
    [((2800, 2100), 12, (1792, 1344)), ((1001, 1000), 1, (449, 448)), ((1800, 900), 2, (896, 448))],
)
def test_large_images_are_shrunk_to_what_tiling_can_use(
    tmp_path, monkeypatch, name, size, most, kept
):
    monkeypatch.setattr(reencode, "MAX_TILES", most)
    path = save(tmp_path / name, drawing(*size))
    data, found = shard_image(path, name)
    image = Image.open(io.BytesIO(data))
    assert found == image.size == kept
    assert image.format == ("JPEG" if name == "a.jpg" else "PNG")
    before, after = (image_tiles(x, most) for x in (path.read_bytes(), data))
    assert before.shape == after.shape
    # Of tiles whose values have a spread of about 1; a wrong grid is off by about 1.
    assert (before - after).abs().mean() < 0.02


@pytest.mark.parametrize("name", ["a.webp", "a.bmp", "a.gif"])
def test_other_formats_are_written_anew(tmp_path, name):
    path = save(tmp_path / name, drawing(300, 200))
    data, size = shard_image(path, name)
    image = Image.open(io.BytesIO(data))
    assert size == image.size == (300, 200)
    assert image.format == ("JPEG" if name == "a.webp" else "PNG")
    before, after = (image_tiles(x, 6) for x in (path.read_bytes(), data))
    assert (before - after).abs().mean() < (0.02 if name == "a.webp" else 1e-9)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16", "1", "LA"])
def test_tiling_sees_the_same_colours(tmp_path, monkeypatch, mode):
    monkeypatch.setattr(reencode, "MAX_TILES", 1)
    picture = drawing(1000, 1000, "I" if mode == "I;16" else mode)
    if mode == "I;16":
        picture = picture.point(lambda grey: grey * 257)
    if mode in ("RGBA", "LA"):
        picture.putalpha(100)
    path = save(tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"), picture.convert(mode))
    data, size = shard_image(path, "a")
    assert size == (448, 448)
    before, after = (image_tiles(x, 1) for x in (path.read_bytes(), data))
    assert (before - after).abs().mean() < 0.02 + 0.05 * (mode in ("P", "1"))  # dithered


def test_what_encoding_again_would_not_make_smaller_is_kept(tmp_path):
    noise = Image.effect_noise((1300, 1300), 90)
    path = save(tmp_path / "a.png", noise)
    assert path.stat().st_size > KEPT_BYTES
    assert shard_image(path, "a.png")[0] == path.read_bytes()


def test_ballast_is_left_out(tmp_path):
    path = save(tmp_path / "a.png", drawing(64, 64))
    path.write_bytes(path.read_bytes() + bytes(KEPT_BYTES))
    data, size = shard_image(path, "a.png")
    assert size == (64, 64) and len(data) < 10_000


def test_a_broken_image_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"<svg/>")
    with pytest.raises(RecordError, match=r"image 'shown\.png': not an image"):
        shard_image(tmp_path / "a.png", "shown.png")


def record(images):
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "+"}]
    return json.dumps({"image": images, "conversations": turns}) + "\n"


def test_shards_hold_the_size_that_their_image_has(tmp_path, monkeypatch):
    monkeypatch.setattr(reencode, "MAX_TILES", 1)
    save(tmp_path / "a.png", drawing(1000, 1000))
    source = tmp_path / "a.jsonl"
    source.write_text(record("a.png"))
    shard_file(source, tmp_path / "out", "training", 1)
    row = ShardFolder(tmp_path / "out").read(0, 0)
    assert row["image_sizes"] == [[448, 448]]
    assert Image.open(io.BytesIO(row["images"][0])).size == (448, 448)


def test_an_image_is_decoded_once_for_solutions_that_follow_each_other(tmp_path, monkeypatch):
    for name in ("a.png", "b.png"):
        save(tmp_path / name, drawing(20, 20))
    decoded = []

    def noted(path, shown):
        decoded.append(shown)
        return read_image(path, shown)

    monkeypatch.setattr(pieces, "read_image", noted)
    source = tmp_path / "a.jsonl"
    source.write_text(record("a.png") * 8 + record(["a.png", "b.png"]) * 8)
    shard_file(source, tmp_path / "out", "training", 2)
    assert decoded == ["a.png", "b.png"]


def test_a_record_with_too_many_bytes_of_images_is_rejected(tmp_path, monkeypatch):
    save(tmp_path / "a.png", drawing(20, 20))
    size = (tmp_path / "a.png").stat().st_size
    monkeypatch.setattr(pieces, "MAX_IMAGE_BYTES", 3 * size)
    source = tmp_path / "a.jsonl"
    source.write_text(record(["a.png"] * 3) + record(["a.png"] * 4))
    shard_file(source, tmp_path / "out", "training", 1)
    assert "its 4 images have more than" in (tmp_path / "out" / REJECTED).read_text()
    assert ShardFolder(tmp_path / "out").num_rows == 1


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Small image files of which most need something done to be seen rightly."""
    folder = tmp_path_factory.mktemp("images")
    deep = np.linspace(0, 65535, 30 * 40).reshape(30, 40, 1)
    pixels, four = random_pixels(30, 40, 3), random_pixels(30, 40, 4)
    for name, data in {
        "plain.png": saved(pixels, "PNG"),
        "opaque.png": saved(Image.fromarray(pixels).convert("RGBA"), "PNG"),
        "turned.jpg": saved(pixels, "JPEG", exif=exif(6)),
        "turned.png": saved(pixels, "PNG", exif=exif(8)),
        "cmyk.jpg": saved(Image.fromarray(pixels).convert("CMYK"), "JPEG"),
        "alpha.png": saved(four, "PNG"),
        "turned_alpha.png": saved(four, "PNG", exif=exif(5)),
        "grey_alpha.png": png(four[..., :2], 8, 4),
        "key.png": png(pixels[..., :1] // 64, 2, 0, png_chunk(b"tRNS", b"\0\3")),
        "deep.png": png(deep, 16, 0),
        "animated.png": png(pixels, frames=[(255 - pixels, 0, 0)]),
        "partial.gif": gif(
            pixels[:20, :20, 0] // 8, random_pixels(256, 3).tobytes(), (40, 30), (5, 5)
        ),
        "alpha.webp": saved(four, "WEBP", lossless=True),
        "turned.webp": saved(pixels, "WEBP", lossless=True, exif=exif(3)),
    }.items():
        (folder / name).write_bytes(data)
    return folder


KEPT = {"plain.png", "opaque.png", "turned.jpg", "turned.png", "cmyk.jpg"}


def test_what_is_stored_shows_the_same_to_all(files):
    for path in sorted(files.iterdir()):
        data, picture = read_image(path, path.name)
        stored, size = shard_image(path, path.name)
        again = decode_image(stored)
        assert size == again.size == picture.size, path.name
        lossy = path.suffix == ".webp"
        assert np.abs(np.asarray(again).astype(int) - np.asarray(picture)).mean() <= 25 * lossy
        assert (stored == data) == (path.name in KEPT), path.name
        if path.name not in KEPT:  # any reader sees it so
            plain = Image.open(io.BytesIO(stored))
            assert plain.mode == "RGB" and plain.getexif() == {}
            assert not plain.has_transparency_data and getattr(plain, "n_frames", 1) == 1


def test_large_images_are_stored_upright_and_on_white(monkeypatch):
    monkeypatch.setattr(reencode, "MAX_TILES", 2)
    pixels = np.full((700, 2800, 4), 0, np.uint8)
    pixels[:, :1400, 3] = 255
    pixels[:, :700, 0] = 255
    for format, data in {
        "PNG": saved(pixels, "PNG", exif=exif(6)),
        "JPEG": saved(np.asarray(as_seen(Image.fromarray(pixels))), "JPEG", exif=exif(6)),
        "WEBP": saved(pixels, "WEBP", exif=exif(6)),
    }.items():
        stored, size = reencode.encoded(data, decode_image(data))
        image = Image.open(io.BytesIO(stored))
        assert image.size == size and size[1] > size[0], format
        assert 274 not in image.getexif()
        colours = [image.getpixel((size[0] // 2, int(y * size[1]))) for y in (0.1, 0.4, 0.8)]
        expected = [(255, 0, 0), (0, 0, 0), (255, 255, 255)]
        assert np.abs(np.subtract(colours, expected)).max() < 8, format


def test_sharding_counts_what_it_puts_on_white(files, tmp_path, capsys):
    names = ["plain.png", "alpha.png", "key.png", "alpha.png", "turned.jpg", "deep.png"]
    turns = '"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "+"}]'
    source = tmp_path / "a.jsonl"
    source.write_text("".join(f'{{"image": "{name}", {turns}}}\n' for name in names))
    flags = ["--train", source, "--out", tmp_path, "--num_shards", 1, "--image_root", files]
    main([str(flag) for flag in flags])
    assert "3 have an image with transparency, now on white" in capsys.readouterr().out
    folder = ShardFolder(tmp_path / "train")
    assert folder.manifest["num_on_white"] == 3
    rows = [folder.read(0, i) for i in range(len(names))]
    assert rows[4]["image_sizes"] == [[30, 40]]  # turned
    for name, row in zip(names, rows, strict=True):
        seen = read_image(files / name, name)[1]
        assert decode_image(row["images"][0]).tobytes() == seen.tobytes()
