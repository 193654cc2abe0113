"""A question is the same one in shards and in evaluation."""

import json
from pathlib import Path

import pytest
from PIL import Image

from data_tools.shard import shard_file
from dreamprm_dist.data.shards import ShardFolder
from dreamprm_dist.errors import InputError
from dreamprm_dist.evaluation.questions import read_meta_questions

FILES = ("a.png", "b.png", "c.png", "d.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four files of equal bytes, the same pixels in two formats that shards do not keep, others."""
    picture = Image.new("RGB", (8, 8), "red")
    for name in (*FILES, "red.bmp", "red.gif"):
        picture.save(tmp_path / name)
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "blue.png")
    return tmp_path


def solution(image: str | list[str], id: object = -1, question: str = "Q", step: str = "s") -> dict:
    """A solution in VisualPRM's format, its first step in the question's turn."""
    text = f"### Question:\n{question}\n\n### Solution Process:\n{step}"
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "+"}]
    return {"id": id, "image": image, "conversations": turns, "true_false": True}


def write(folder: Path, records: list[dict]) -> Path:
    path = folder / "meta.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


CASES = {
    "no id, paths of equal bytes": ([solution(f, step=f) for f in FILES], [0, 0, 0, 0]),
    "no id in any spelling": ([solution("a.png", i) for i in (-1, "-1", "", None)], [0, 0, 0, 0]),
    "no id, other pixels": ([solution(f) for f in ("a.png", "blue.png", "b.png")], [0, 1, 0]),
    "no id, other bytes of equal pixels": (
        [solution(f) for f in ("red.bmp", "red.gif", "red.bmp")],
        [0, 1, 0],
    ),
    "no id, another text": ([solution("a.png", question=q) for q in "QPQ"], [0, 1, 0]),
    "no id, another number of images": (
        [solution(f) for f in (["a.png", "b.png"], "a.png", ["c.png", "d.png"])],
        [0, 1, 0],
    ),
    "one id": ([solution(f, "7", q) for f, q in zip(FILES, "QPQP", strict=True)], [0, 0, 0, 0]),
    "one id, a number and a text": ([solution("a.png", i) for i in (7, "7")], [0, 0]),
    "other ids": ([solution("a.png", i) for i in (7, 8, 7)], [0, 1, 0]),
}


@pytest.mark.parametrize("case", CASES)
def test_shards_and_evaluation_agree(case: str, folder: Path) -> None:
    records, expected = CASES[case]
    path = write(folder, records)
    shard_file(path, folder / "out", "meta", 1, progress=False)
    shards = ShardFolder(folder / "out")
    by_row = dict(
        zip(shards.read_column(0, "sample_id"), shards.read_column(0, "group_id"), strict=True)
    )
    assert [by_row[row] for row in range(len(records))] == expected
    questions = read_meta_questions(str(path), folder)
    sizes = [expected.count(group) for group in range(max(expected) + 1)]
    assert [len(question.conversations) for question in questions] == sizes


def test_one_id_with_other_images_is_refused(folder: Path) -> None:
    path = write(folder, [solution("a.png", 7), solution("b.png", 7), solution("blue.png", 7)])
    with pytest.raises(InputError) as error:
        read_meta_questions(str(path), folder)
    says = str(error.value)
    assert says.startswith(f"{path}, record 3: ") and "the id '7' of record 1" in says
    assert "give each question an id of its own" in says


def test_images_are_read_only_where_they_decide(folder: Path) -> None:
    path = write(folder, [solution("none.png", 7), solution("none.png", 7)])
    assert len(read_meta_questions(str(path), folder)) == 1
    path = write(folder, [solution("none.png"), solution("none.png")])
    with pytest.raises(InputError, match=r"record 1: image 'none\.png': no such file"):
        read_meta_questions(str(path), folder)
