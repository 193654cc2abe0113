"""What `PRM` makes of its arguments: it understands them, or says in a sentence what is wrong."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dreamprm_dist import PRM
from dreamprm_dist.errors import InputError


@pytest.fixture(scope="module")
def prm(tiny_prm_dir: Path) -> PRM:
    return PRM.from_pretrained(tiny_prm_dir, precision="fp32", device="cpu")


@pytest.fixture(scope="module")
def png() -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((32, 32)).save(buffer, "PNG")
    return buffer.getvalue()


def test_one_image_in_many_forms_has_one_score(prm: PRM, png: bytes, tmp_path: Path):
    path = tmp_path / "a.png"
    path.write_bytes(png)
    opened = Image.open(io.BytesIO(png))
    expected = prm.score(png, "Q", ["s"])
    for image in (bytearray(png), path, str(path), opened, [png], (path,), [opened]):
        assert prm.score(image, "Q", ["s"]) == expected
    assert prm.score(None, "Q", ("s",)) == prm.score([], "Q", ["s"]) != expected


FORMS = "give a path, the bytes of an image file or a Pillow image"
IMAGES = [
    (np.zeros((32, 32, 3), np.uint8), f"the image is of type ndarray; {FORMS}"),
    (torch.zeros(3, 32, 32), f"the image is of type Tensor; {FORMS}"),
    ([np.zeros((32, 32))], r"images\[0\] is of type ndarray"),
    ([["a.png"]], r"images\[0\] is of type list"),
    ({"a.png": 1}, "the image is of type dict"),
    (7, "the image is of type int"),
    (io.BytesIO(b"x"), "the image is of type BytesIO"),
    ([None], r"images\[0\] is of type NoneType"),
    ("gone.png", "'gone.png': no such file"),
    ("/", "is a folder"),
    ("a\0b", "no such file"),
    ("data:image/png;base64," + "A" * 9000, "a text of 9022 characters and no path"),
    (b"hello", "the image: not an image"),
    ([b""], r"images\[0\]: not an image"),
]


@pytest.mark.parametrize(("image", "said"), IMAGES)
def test_what_is_no_image_is_one_sentence(prm: PRM, image, said: str):
    with pytest.raises(InputError, match=said) as error:
        prm.score(image, "Q", ["s"])
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_a_closed_image_is_one_sentence(prm: PRM, png: bytes):
    image = Image.open(io.BytesIO(png))
    image.close()
    with pytest.raises(InputError, match="cannot be read"):
        prm.score(image, "Q", ["s"])


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ("s", "steps is one text; give a list"),
        (None, "steps is of type NoneType"),
        ({"a": "b"}, "steps is of type dict"),
        (np.array(["s"]), "steps is of type ndarray"),
        ([["s"]], r"steps\[0\] is of type list; give a text"),
        (["s", 3], r"steps\[1\] is of type int"),
        ([b"s"], r"steps\[0\] is of type bytes"),
    ],
)
def test_what_is_no_list_of_steps_is_one_sentence(prm: PRM, steps, said: str):
    with pytest.raises(InputError, match=said):
        prm.score(None, "Q", steps)
    if not isinstance(steps, str):  # as a candidate a text is understood
        with pytest.raises(InputError, match=said.replace("steps", r"candidates\[0\]")):
            prm.best_of_n(None, "Q", [steps])


@pytest.mark.parametrize("question", [None, 3, ["Q"], b"Q", {"question": "Q"}])
def test_what_is_no_question_is_one_sentence(prm: PRM, question):
    with pytest.raises(InputError, match=r"question is of type \w+; give a text"):
        prm.score(None, question, ["s"])
    with pytest.raises(InputError, match=r"question is of type \w+; give a text"):
        prm.best_of_n(None, question, ["s"])


@pytest.mark.parametrize(
    ("candidates", "aggregation", "said"),
    [
        ("s", "mean", "candidates is one text; give a list"),
        ({"a": 1}, "mean", "candidates is of type dict"),
        (None, "mean", "candidates is of type NoneType"),
        ([], "mean", "there is no candidate"),
        (["s", None], "mean", r"candidates\[1\] is of type NoneType"),
        ([[["s"]]], "mean", r"candidates\[0\]\[0\] is of type list"),
        (["s"], "median", "unknown aggregation 'median'; choose from mean"),
        (["s"], ["mean"], "unknown aggregation"),
        (["s"], None, "unknown aggregation None"),
    ],
)
def test_what_cannot_be_chosen_from_is_one_sentence(prm: PRM, candidates, aggregation, said: str):
    with pytest.raises(InputError, match=said):
        prm.best_of_n(None, "Q", candidates, aggregation)
