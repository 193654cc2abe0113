"""What a file is by its first bytes, for messages about one that is not what it should be."""

from __future__ import annotations

from codecs import getincrementaldecoder

EMPTY, BLANK, TEXT = "an empty file", "a file of zeros or blanks", "a text file"
ZIP, GZIP, PARQUET, ARROW = "a ZIP archive", "a gzip file", "a Parquet file", "an Arrow file"
_PREFIXES = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "a TIFF file"),
    (b"MM\0*", "a TIFF file"),
    (b"II+\0", "a TIFF file"),
    (b"MM\0+", "a TIFF file"),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000 file"),
    (b"\xff\x4f\xff\x51", "a JPEG 2000 file"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL file"),
    (b"\xff\x0a", "a JPEG XL file"),
    (b"\0\0\1\0", "an icon (ICO)"),
    (b"8BPS", "a Photoshop file"),
    (b"qoif", "a QOI file"),
    (b"%PDF", "a PDF document"),
    (b"%!PS", "a PostScript file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"PK\x03\x04", ZIP),
    (b"\x1f\x8b", GZIP),
    (b"PAR1", PARQUET),
    (b"ARROW1", ARROW),
    (b"BZh", "a bzip2 file"),
    (b"\xfd7zXZ", "an xz file"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"SQLite format 3", "an SQLite database"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\xff\xfe", "a text in UTF-16"),
    (b"\xfe\xff", "a text in UTF-16"),
    (b"version https://git-lfs", "a Git LFS pointer (fetch the file with `git lfs pull`)"),
    *((b"P%d\n" % i, "a PNM file") for i in range(1, 8)),
)
_BRANDS = {b"avi": "an AVIF file", b"hei": "a HEIC file", b"hev": "a HEIC file"}
_BRANDS |= {b"mif": "a HEIC file", b"msf": "a HEIC file"}
LOOKED_AT = 1024  # bytes


def kind_of_file(data: bytes) -> str | None:
    """A file's kind in words; for JPEG, PNG, GIF, BMP and WEBP the format's name.

    None: not known.
    """
    if not data.strip(b"\0 \t\r\n"):
        return BLANK if data else EMPTY
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp":
        return _BRANDS.get(data[8:11], "a video")
    for prefix, kind in _PREFIXES:
        if data.startswith(prefix):
            return kind
    return _kind_of_text(data[:LOOKED_AT])


def _kind_of_text(start: bytes) -> str | None:
    try:
        text = getincrementaldecoder("utf-8-sig")().decode(start)  # its last character may be cut
    except UnicodeDecodeError:
        return None
    text = text.lstrip().lower()
    if "<svg" in text:
        return "an SVG drawing"
    if text.startswith(("<!doctype html", "<html", "<head", "<body")):
        return "an HTML page"
    if text.startswith("<?xml"):
        return "an XML file"
    return TEXT if all(c.isprintable() or c.isspace() for c in text) else None
