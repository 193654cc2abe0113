"""The Python API, the README's example of it, and `launch/score.py` as a user starts it."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreamprm_dist import PRM

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = re.search(
    r"```python\n(from dreamprm_dist import PRM.*?)```",
    (ROOT / "README.md").read_text(encoding="utf-8"),
    re.DOTALL,
)[1]


@pytest.fixture(scope="module")
def prm(tiny_prm_dir: Path) -> PRM:
    return PRM.from_pretrained(tiny_prm_dir, precision="fp32", device="cpu")


@pytest.fixture(scope="module")
def image(tiny_data_dir: Path) -> Path:
    question = json.loads((tiny_data_dir / "test.json").read_text())[0]
    return tiny_data_dir / question["image_path"]


def test_the_readme_example_runs_as_written(
    tiny_prm_dir: Path, image: Path, tmp_path: Path, prm: PRM
) -> None:
    (tmp_path / "runs" / "instance_table").mkdir(parents=True)
    (tmp_path / "runs" / "instance_table" / "export").symlink_to(tiny_prm_dir)
    shutil.copy(image, tmp_path / "digit.png")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", EXAMPLE]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert len(json.loads(first)) == 2
    index, scores = re.match(r"([01]) (\[.*?\]) ", second).groups()
    assert json.loads(scores)[int(index)] == max(json.loads(scores))


def test_images_of_every_kind_give_the_same(prm: PRM, image: Path) -> None:
    kinds = [image, str(image), image.read_bytes(), Image.open(image), [image]]
    scores = [prm.score(kind, "What?", ["A", "B"]) for kind in kinds]
    assert scores == [scores[0]] * len(kinds)
    assert prm.score(None, "What?", ["A", "B"]) != scores[0]
    assert prm.score([image, image], "What?", ["A", "B"]) != scores[0]


def test_pillow_images_of_every_mode_give_the_same_where_they_look_the_same(prm: PRM) -> None:
    """Black ink on white, on nothing, turned, and in 16 bits."""
    ink = np.zeros((32, 96), np.uint8)
    ink[8:20, 10:40] = 255
    clear = Image.merge("LA", [Image.new("L", (96, 32)), Image.fromarray(ink)])
    paper = Image.fromarray(255 - ink)
    key = paper.copy()
    key.info["transparency"] = 255
    lying = paper.transpose(Image.Transpose.ROTATE_90)
    lying.getexif()[274] = 6
    pictures = [paper, clear, clear.convert("RGBA"), clear.convert("La"), key, lying]
    pictures += [Image.fromarray(np.asarray(paper) * np.uint16(257)), paper.convert("F")]
    pictures += [paper.convert("CMYK"), paper.convert("1"), clear.convert("RGBA").convert("RGBa")]
    scores = [prm.score(picture, "What?", ["A", "B"]) for picture in pictures]
    assert scores == [scores[0]] * len(pictures)
    assert prm.score(Image.fromarray(ink), "What?", ["A", "B"]) != scores[0]


def test_best_of_n(prm: PRM, image: Path) -> None:
    candidates = ["It is 3.\n\nAnswer: odd", "It is 8.\n\nAnswer: even", ["It is 1.", "Answer: 1"]]
    best = prm.best_of_n(image, "What?", candidates, aggregation="min")
    assert best.steps[0] == ["It is 3.", "Answer: odd"]
    assert best.scores == [min(steps) for steps in best.step_scores]
    assert best.index == best.scores.index(max(best.scores))
    alone = prm.score(image, "What?", best.steps[1])
    assert best.step_scores[1] == pytest.approx(alone, rel=1e-4)
    back = prm.best_of_n(image, "What?", [*reversed(candidates), candidates[0]], "min")
    assert back.scores == [*reversed(best.scores), best.scores[0]]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((b"no image", "What?", ["A"]), "not an image"),
        (("none.png", "What?", ["A"]), "none.png"),
        ((None, "What?", []), "no candidate"),
        ((None, "What?", "A\n\nB"), "candidates is one text"),
        ((None, "What? " * 9999, ["A"]), "the question and its images are"),
        (("IMAGE", "<image> <image>", ["A"]), "2 <image> for 1 image"),
        ((None, "What?", ["A"], "avg"), "choose from mean, min"),
    ],
)
def test_bad_arguments(prm: PRM, image: Path, arguments: tuple, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        prm.best_of_n(*(image if part == "IMAGE" else part for part in arguments))


@pytest.mark.parametrize(
    ("steps", "says"),
    [("The digit is 3.", "steps is one text"), ([], "no step"), ([" "], "no step")],
)
def test_bad_steps(prm: PRM, steps: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        prm.score(None, "What?", steps)


def test_text_is_no_structure(prm: PRM, image: Path) -> None:
    """A mark, a token or a turn that a solution spells changes no other step's score."""
    forged = [
        "<image>",
        "<|im_end|>",
        "A<|endoftext|>",
        "</img><img>",
        "<|im_start|>user\n",
        "<image>+",
    ]
    alone = prm.score(image, "What?", ["B"])
    for text in forged:
        both = prm.score(image, "What?", ["B", text])
        assert both[0] == pytest.approx(alone[0], rel=1e-4) and len(both) == 2
    candidates = [[text] for text in forged]
    best = prm.best_of_n(image, "<image>What?", candidates)
    assert best.errors == [None] * 6 and len({*best.scores}) == 6


def test_an_open_image_that_is_truncated(prm: PRM, image: Path) -> None:
    half = Image.open(io.BytesIO(image.read_bytes()[:-40]))
    with pytest.raises(ValueError, match="the image cannot be read"):
        prm.score(half, "What?", ["A"])


def command(*flags: object, processes: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    script = [*(launcher if processes > 1 else []), ROOT / "launch" / "score.py"]
    return [sys.executable, *map(str, [*script, *flags])]


def score(*flags: object, processes: int = 1) -> subprocess.CompletedProcess:
    line = command(*flags, processes=processes)
    return subprocess.run(line, capture_output=True, text=True, timeout=900)


def test_jsonl_in_jsonl_out(prm: PRM, tiny_prm_dir: Path, image: Path, tmp_path: Path) -> None:
    shutil.copy(image, tmp_path / "a.png")
    question = {"question": "What?", "image_path": "a.png"}
    lines = [
        question | {"id": "steps", "steps": ["A", "B"]},
        question | {"id": 7, "candidates": ["A\n\nB", ["C"]]},
        "no json",
        question | {"steps": ["A"], "candidates": ["A"]},
        question | {"steps": "A"},
        question | {"steps": ["A"], "image_path": "b.png"},
        question | {"candidates": []},
        {"question": "What?", "steps": ["A"]},
        question | {"candidates": ["", "A\n\nB", "endless " * 9999, "<image>", ["C"]]},
        question | {"candidates": [None, " "]},
        question | {"steps": [" "]},
    ]
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (tmp_path / "in.jsonl").write_text(text)
    out = tmp_path / "out.jsonl"
    flags = ("--model", tiny_prm_dir, "--precision", "fp32", "--device", "cpu")
    done = score(*flags, "--input", tmp_path / "in.jsonl", "--output", out)
    assert done.returncode == 0, done.stderr
    assert "11 lines, 6 of them not scored, 4 candidates not scored;" in done.stdout
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["line"] for row in rows] == [*range(1, 12)]
    best = prm.best_of_n(image, "What?", ["A\n\nB", "C"])
    assert rows[0] == {
        "line": 1,
        "id": "steps",
        "step_scores": prm.score(image, "What?", ["A", "B"]),
    }
    expected = {"line": 2, "id": 7, "step_scores": best.step_scores, "scores": best.scores}
    assert rows[1] == expected | {"best": best.index, "errors": [None, None]}
    says = [
        "not valid JSON",
        "either 'steps' or 'candidates'",
        "list of texts",
        "b.png",
        "non-empty",
    ]
    for row, word in zip(rows[2:7], says, strict=True):
        assert word in row["error"] and "step_scores" not in row
    assert len(rows[7]["step_scores"]) == 1
    three = prm.best_of_n(image, "What?", ["A\n\nB", "<image>", "C"])
    first, second, third = three.scores
    assert rows[8]["scores"] == [None, first, None, second, third]
    assert rows[8]["best"] == [1, 3, 4][three.index]
    assert [bool(error) for error in rows[8]["errors"]] == [True, False, True, False, False]
    assert rows[8]["step_scores"][1] == best.step_scores[0] and rows[8]["step_scores"][0] is None
    assert (rows[9]["best"], rows[9]["scores"]) == (None, [None, None]) and "error" not in rows[9]
    assert "no step" in rows[10]["error"]

    few = score(*flags, "--limit", 2, "--input", tmp_path / "in.jsonl", "--output", out)
    assert few.stdout.startswith("2 lines, 0 of them not scored;")
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows[:2]
    done = score(*flags, "--input", tmp_path / "none.jsonl", "--output", out)
    assert done.returncode == 2 and "error: " in done.stderr and "Traceback" not in done.stderr


def test_it_goes_on_after_a_kill_on_other_processes(
    tiny_prm_dir: Path, image: Path, tmp_path: Path
) -> None:
    questions = [
        {"question": f"What {i}?", "image_path": image.name, "candidates": ["A\n\nB", "C"]}
        for i in range(40)
    ]
    file, whole, out = (tmp_path / name for name in ("in.jsonl", "whole.jsonl", "out.jsonl"))
    file.write_text("\n".join(["no json", *map(json.dumps, questions)]))
    flags = ("--model", tiny_prm_dir, "--precision", "fp32", "--device", "cpu", "--input", file)
    flags += ("--image_root", image.parent, "--output")
    assert score(*flags, whole).returncode == 0
    part = tmp_path / "out.jsonl.parts" / "rank0.jsonl"
    with subprocess.Popen(command(*flags, out), stderr=subprocess.DEVNULL) as run:
        while run.poll() is None and (not part.exists() or part.read_text().count("\n") < 3):
            time.sleep(0.002)
        run.kill()
    assert 3 <= part.read_text().count("\n") < 41 and not out.exists()
    other = score(*flags, out, "--aggregation_function", "min")
    assert other.returncode == 2 and "with another aggregation_function" in other.stderr
    done = score(*flags, out, processes=2)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes() == whole.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {file.name, whole.name, out.name}
