"""Reading and checking records and images: every kind of bad input gets its own message."""

import copy
import io
import json
import struct
import zlib

import pytest
from PIL import Image

from dreamprm_dist.data.images import decode_image
from dreamprm_dist.data.json_records import parse_line, read_json_records
from dreamprm_dist.data.schema import (
    MetaRecord,
    parse_meta_record,
    parse_scoring_record,
    parse_test_record,
    parse_training_record,
    parts_around_images,
    require_object,
)
from dreamprm_dist.errors import RecordError

GOOD = {
    "id": "q1",
    "image": "a.png",
    "conversations": [
        {"from": "system", "value": "Judge."},
        {"from": "human", "value": "### Question:\nWhat is it?"},
        {"from": "gpt", "value": " + "},
        {"from": "human", "value": "It is 4."},
        {"from": "gpt", "value": None},
        {"from": "human", "value": "So even."},
        {"from": "gpt", "value": "-\n"},
    ],
}


def changed(**fields):
    return {**copy.deepcopy(GOOD), **fields}


def turns(*pairs):
    return [{"from": speaker, "value": value} for speaker, value in pairs]


def image_bytes(format="PNG", size=(20, 10)):
    # A gradient: a single colour compresses so well that cutting the file may cut nothing.
    image = Image.linear_gradient("L").resize(size).convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def png_header(width, height):
    def chunk(name, body):
        crc = struct.pack(">I", zlib.crc32(name + body))
        return struct.pack(">I", len(body)) + name + body + crc

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 100)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


# Files


def test_jsonl_with_bom_crlf_blank_lines_and_unicode(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"id": "\xc3\xa9\xe2\x88\x9a"}\r\n\r\n  \r\n{"id": 2}\r\n')
    assert list(read_json_records(path)) == [(1, {"id": "é√"}), (4, {"id": 2})]


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf", b" \r\n\t", b"\n" * 5000])
def test_json_list_is_told_by_its_first_character(tmp_path, start):
    path = tmp_path / "a.jsonl"  # the name says nothing
    path.write_bytes(start + b'[{"id": 1},\r\n {"id": 2}]')
    assert list(read_json_records(path)) == [(1, {"id": 1}), (2, {"id": 2})]


@pytest.mark.parametrize(
    "bad",
    [b'{"id": ', b"\xff\xfe", b"[" * 100_000, b"3", b'{"id": ' + b"1" * 5000 + b"}"],
    ids=["cut", "not utf-8", "nested", "no object", "huge integer"],
)
def test_a_bad_jsonl_line_is_reported_and_reading_goes_on(tmp_path, bad):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"id": 1}\n' + bad + b'\n{"id": 3}\n')
    (_, first), (line, error), (last_line, last) = read_json_records(path)
    assert (first, last, last_line) == ({"id": 1}, {"id": 3}, 3)
    assert isinstance(error, RecordError) and line == 2


@pytest.mark.parametrize(
    ("data", "where"),
    [(b'[{"id": 1},\n {"id" 2}]', "line 2, column 8"), (b'[\n"\xff"]', "line 2, column 2")],
)
def test_a_malformed_json_list_names_file_line_and_column(tmp_path, data, where):
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(RecordError, match=where) as caught:
        read_json_records(path)
    assert str(path) in str(caught.value)


def test_deeply_nested_json_list_is_a_record_error(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"[" * 100_000)
    with pytest.raises(RecordError):
        read_json_records(path)


def test_a_list_entry_that_is_no_object_is_reported(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"id": 1}, 7]')
    (_, first), (index, error) = read_json_records(path)
    assert first == {"id": 1} and index == 2 and "not 7" in str(error)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_json_records(tmp_path / "none.json")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        read_json_records(tmp_path)


def test_empty_file_has_no_records(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf\r\n")
    assert list(read_json_records(path)) == []


# Records


def test_training_record_is_normalised():
    record = parse_training_record(changed(dataset="d", extra=1))
    assert (record.source_id, record.images, record.dataset) == ("q1", ["a.png"], "d")
    labels = [turn["value"] for turn in record.conversations if turn["from"] == "gpt"]
    assert labels == ["+", None, "-"]
    extra = turns(("human", "h"), ("gpt", "+"))
    extra[1]["score"] = 0.5
    parsed = parse_training_record(changed(conversations=extra)).conversations
    assert parsed == turns(("human", "h"), ("gpt", "+"))


@pytest.mark.parametrize(("value", "images"), [(None, []), ([], []), (["a", "b"], ["a", "b"])])
def test_image_is_a_path_a_list_or_absent(value, images):
    assert parse_training_record(changed(image=value)).images == images


def test_absent_image_and_id():
    record = parse_training_record({"conversations": GOOD["conversations"]})
    assert (record.images, record.source_id, record.dataset) == ([], "", "")
    assert parse_training_record(changed(id=-1)).source_id == "-1"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([1], "must be a JSON object"),
        ({"id": "x"}, "'conversations' must be a non-empty list"),
        (changed(conversations=[]), "'conversations' must be a non-empty list"),
        (changed(conversations="+"), "'conversations' must be a non-empty list"),
        (changed(conversations=["+"]), r"conversations\[0\] must be an object"),
        (changed(conversations=turns(("user", "h"), ("gpt", "+"))), "'from' must be system"),
        (changed(conversations=turns(({}, "h"), ("gpt", "+"))), "'from' must be system"),
        (changed(conversations=turns(("human", None), ("gpt", "+"))), r"\(human\) must be text"),
        (
            changed(conversations=turns(("system", 3), ("human", "h"), ("gpt", "+"))),
            r"\(system\) must be text",
        ),
        (changed(conversations=turns(("human", "h"), ("gpt", "yes"))), "must be '\\+', '-' or"),
        (changed(conversations=turns(("human", "h"), ("gpt", ""))), "must be '\\+', '-' or null"),
        (changed(conversations=turns(("human", "h"), ("gpt", True))), "must be '\\+', '-' or"),
        (changed(conversations=turns(("human", "h"), ("gpt", ["+"]))), "must be '\\+', '-' or"),
        (changed(conversations=turns(("human", "h"))), "has no step"),
        (changed(conversations=turns(("gpt", "+"), ("human", "h"))), "before any human turn"),
        (
            changed(conversations=turns(("system", "s"), ("gpt", "+"), ("human", "h"))),
            "before any human turn",
        ),
        (changed(conversations=turns(("human", "\ud800"), ("gpt", "+"))), "surrogate"),
        (changed(image=3), "'image' must be text"),
        (changed(image=["a", None]), "'image' must be text"),
        (changed(image=""), "'image' is an empty path"),
        (changed(id=True), "'id' must be text"),
        (changed(id=[1]), "'id' must be text"),
        (changed(dataset=3), "'dataset' must be text"),
    ],
)
def test_bad_training_records(record, message):
    with pytest.raises(RecordError, match=message) as caught:
        parse_training_record(record)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "images", "good"),
    [
        ("h", 2, True),
        ("<image> h", 1, True),
        ("<image> and <image>", 2, True),
        ("<image> and <image>", 1, False),
        ("<image> h", 2, False),
        ("<image> h", 0, True),  # without an image it is text
        ("h\n\n### Solution Process:\n<image> <image>", 1, True),
        ("<image> h\n\n### Solution Process:\n<image>", 1, True),
        ("<image> <image>\n\n### Solution Process:\ns", 1, False),
        ("<image 1> h <image 2>", 1, True),  # MMMU's marks are text
    ],
)
def test_marks_in_the_question_must_match_the_images(text, images, good):
    record = changed(
        image=[f"{i}.png" for i in range(images)],
        conversations=turns(
            ("system", "<image> <image> <image>"),
            ("human", text),
            ("gpt", "+"),
            ("human", "<image><image><image>"),
            ("gpt", "-"),
        ),
    )
    if good:
        assert len(parse_training_record(record).images) == images
    else:
        with pytest.raises(RecordError, match="<image>"):
            parse_training_record(record)


@pytest.mark.parametrize(
    ("question", "images", "parts"),
    [
        ("h", 0, ["h"]),
        ("<image> h", 0, ["<image> h"]),
        ("h", 2, ["", "", "h"]),
        ("a <image> b", 1, ["a ", " b"]),
        ("<image><image>", 2, ["", "", ""]),
        ("<image>a### Solution Process:b<image>", 1, ["", "a### Solution Process:b<image>"]),
        ("a### Solution Process:<image>", 1, ["", "a### Solution Process:<image>"]),
        ("<imag<image>e>", 1, ["<imag", "e>"]),
    ],
)
def test_parts_around_images(question, images, parts):
    assert parts_around_images(question, images) == parts


CONVERSATIONS = turns(("human", "h"), ("gpt", "+"))
RAW = {"question": "q", "steps_with_score": [{"step": "s", "score": 1.0}]}


@pytest.mark.parametrize(
    ("parse", "record", "messages"),
    [
        (parse_test_record, RAW, ["raw record of VisualPRM400K", "convert raw", "test records"]),
        (parse_test_record, {"conversations": CONVERSATIONS}, ["a training or meta record"]),
        (
            parse_test_record,
            {"question": "q"},
            ["question without solutions", "convert candidates"],
        ),
        (parse_meta_record, RAW, ["raw record of VisualPRM400K"]),
        (parse_training_record, RAW, ["raw record of VisualPRM400K", "'conversations'"]),
        (parse_training_record, {"question": "q", "candidates": ["a"]}, ["a test record"]),
        (parse_meta_record, {"question": "q", "candidates": ["a"]}, ["a test record"]),
        (
            parse_meta_record,
            {"conversations": CONVERSATIONS},
            ["a training record", "'true_false'"],
        ),
        (parse_scoring_record, {"conversations": CONVERSATIONS}, ["training or meta", "'steps'"]),
        (parse_scoring_record, RAW, ["raw record of VisualPRM400K"]),
    ],
)
def test_a_record_of_another_kind_is_named(parse, record, messages):
    with pytest.raises(RecordError) as caught:
        parse(record)
    assert all(message in str(caught.value) for message in messages), caught.value
    assert "\n" not in str(caught.value)


def test_long_values_are_cut_in_messages():
    with pytest.raises(RecordError) as caught:
        parse_training_record(changed(conversations=turns(("human", "h"), ("gpt", "x" * 10**6))))
    assert len(str(caught.value)) < 200


def test_meta_record():
    record = parse_meta_record(changed(true_false=False, response="Answer: 4"))
    assert isinstance(record, MetaRecord)
    assert (record.true_false, record.response, record.source_id) == (False, "Answer: 4", "q1")
    assert parse_meta_record(changed(true_false=True)).response == ""


@pytest.mark.parametrize("value", [None, 1, "true"])
def test_meta_record_needs_a_real_boolean(value):
    with pytest.raises(RecordError, match="'true_false' must be true or false"):
        parse_meta_record(changed(true_false=value))
    with pytest.raises(RecordError, match="'conversations'"):
        parse_meta_record({"true_false": True})


TEST = {
    "question": "Q?",
    "image_path": "a.png",
    "candidates": ["a", "b"],
    "true_false": [True, False],
}


def test_a_candidate_without_text_is_an_empty_one():
    assert parse_test_record(TEST | {"candidates": [None, ""]}).candidates == ["", ""]
    scoring = {"question": "Q?", "candidates": [None, [], "a"]}
    assert parse_scoring_record(scoring) == ("Q?", [], ["", [], "a"])
    with pytest.raises(RecordError, match="'steps' must be a list"):
        parse_scoring_record({"question": "Q?", "steps": None})


def test_test_record():
    record = parse_test_record(TEST)
    assert (record.images, record.candidates, record.true_false) == (
        ["a.png"],
        ["a", "b"],
        [True, False],
    )
    assert (record.id, record.subject, record.answer, record.options) == ("", "", "", None)
    full = {**TEST, "id": 5, "subject": "Art", "answer": "A", "options": ["x", "y"]}
    record = parse_test_record({**full, "image_path": ["a.png", "b.png"]})
    assert (record.id, record.subject, record.answer) == ("5", "Art", "A")
    assert (record.options, record.images) == (["x", "y"], ["a.png", "b.png"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"question": None}, "'question' must be text"),
        ({"question": " "}, "'question' is empty"),
        ({"candidates": []}, "'candidates' must be a non-empty list"),
        ({"candidates": "ab"}, "'candidates' must be a non-empty list"),
        ({"candidates": ["a", 1]}, r"candidates\[1\] must be text"),
        ({"true_false": [True]}, "1 entries for 2 candidates"),
        ({"true_false": [1, 0]}, "list of true and false"),
        ({"true_false": True}, "list of true and false"),
        ({"options": "A"}, "'options' must be a list"),
        ({"image_path": [1]}, "'image_path' must be text"),
        ({"question": "<image> <image>"}, "2 <image> for 1 image"),
    ],
)
def test_bad_test_records(fields, message):
    with pytest.raises(RecordError, match=message):
        parse_test_record({**TEST, **fields})


# Images


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
def test_good_images_and_truncated_ones(format):
    data = image_bytes(format, size=(160, 120))
    assert decode_image(data).size == (160, 120)
    for share in (0.9, 0.5):
        with pytest.raises(RecordError, match="truncated or broken"):
            decode_image(data[: int(len(data) * share)])


@pytest.mark.parametrize(
    ("width", "height"),
    [(9000, 8000), (12_000, 10_000), (100_000, 100_000)],
    ids=["above our limit", "where Pillow warns", "where Pillow refuses"],
)
def test_decompression_bombs_are_refused_from_the_header(width, height):
    # Decoding would fail too, this file holds no such picture: the message tells which came first.
    with pytest.raises(RecordError, match="too many pixels"):
        decode_image(png_header(width, height))


def test_max_pixels_is_inclusive():
    data = image_bytes(size=(20, 10))
    assert decode_image(data, max_pixels=200).size == (20, 10)
    with pytest.raises(RecordError, match="too many pixels"):
        decode_image(data, max_pixels=199)


@pytest.mark.parametrize("format", ["TIFF", "PPM", "ICO"])
def test_other_formats_are_refused(format):
    with pytest.raises(RecordError, match="supported format"):
        decode_image(image_bytes(format, size=(32, 32)))


@pytest.mark.parametrize("data", [b"", b"<svg/>", json.dumps(GOOD).encode()])
def test_what_is_no_image_is_refused(data):
    with pytest.raises(RecordError, match="supported format"):
        decode_image(data)


@pytest.mark.parametrize("size", [(0, 10), (10, 0)])
def test_zero_size_is_refused(size):
    with pytest.raises(RecordError, match=r"no pixels|supported format|broken"):
        decode_image(png_header(*size))


def test_damage_inside_a_png_is_refused():
    data = bytearray(image_bytes(size=(160, 120)))
    data[data.index(b"IDAT") + 20] ^= 0xFF
    with pytest.raises(RecordError, match="truncated or broken"):
        decode_image(bytes(data))


@pytest.mark.parametrize(
    "parse", [require_object, parse_training_record, parse_meta_record, parse_test_record]
)
def test_a_line_that_cannot_be_read_keeps_its_reason(parse):
    error = parse_line(b"{")
    with pytest.raises(RecordError, match="not valid JSON") as caught:
        parse(error)
    assert caught.value is error
