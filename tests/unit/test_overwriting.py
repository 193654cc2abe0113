"""No command writes where it reads, however the two are spelled, also with --overwrite."""

import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from data_tools import convert, decontaminate, generate, sample, shard
from dreamprm_dist.errors import InputError
from dreamprm_dist.evaluation.run import EvaluateConfig, evaluate
from dreamprm_dist.evaluation.score_file import ScoreConfig, score_file
from dreamprm_dist.files import refuse_overwriting
from dreamprm_dist.report.overview import write_run_report
from dreamprm_dist.training.config import parse_train_config

REPO = Path(__file__).resolve().parents[2]
REFUSED = "would overwrite the input|is read as an input"


def launch(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"launch_{name}", REPO / "launch" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(**flags: str) -> None:
    argv = [f"--{name}={value}" for name, value in flags.items()]
    launch("train").train(parse_train_config(argv), torch.device("cpu"))


SERVER = ["--base_url", "http://127.0.0.1:9/v1", "--model", "m", "--retries", "0"]
# From the input and the output to a call that reads the one and writes the other.
RECORDS: dict[str, Callable[[str, str], object]] = {
    "raw": lambda a, b: convert.main(["raw", a, "--out", b, "--overwrite"]),
    "conversations": lambda a, b: convert.main(["conversations", a, "--out", b, "--overwrite"]),
    "reference": lambda a, b: convert.main(
        ["reference", "other.jsonl", a, "--kind", "meta", "--out", b, "--overwrite"]
    ),
    "mmmu": lambda a, b: convert.main(["mmmu", a, "--out", b, "--overwrite"]),
    "questions": lambda a, b: convert.main(
        [
            "candidates",
            a,
            "--candidates",
            "other.jsonl",
            "--kind",
            "test",
            "--out",
            b,
            "--overwrite",
        ]
    ),
    "candidates": lambda a, b: convert.main(
        [
            "candidates",
            "other.jsonl",
            "--candidates",
            a,
            "--kind",
            "test",
            "--out",
            b,
            "--overwrite",
        ]
    ),
    "decontaminate": lambda a, b: decontaminate.main(
        [a, "--against", "other.jsonl", "--out", b, "--overwrite"]
    ),
    "against": lambda a, b: decontaminate.main(
        ["other.jsonl", "--against", "other.jsonl", a, "--out", b, "--overwrite"]
    ),
    "sample": lambda a, b: sample.main([a, "--n", "1", "--out", b, "--overwrite"]),
    "generate": lambda a, b: generate.main([a, *SERVER, "--out", b, "--overwrite"]),
    "score": lambda a, b: score_file(ScoreConfig(input=a, out=b, device="cpu")),
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with files and links to them."""
    monkeypatch.chdir(tmp_path)
    record = {"id": "a", "question": "Q?", "response": "Answer: 1", "candidates": ["1"]}
    (tmp_path / "sub").mkdir()
    for name in ("in.jsonl", "other.jsonl"):
        (tmp_path / name).write_text(json.dumps(record) + "\n")
    os.symlink("in.jsonl", "link.jsonl")
    os.link("in.jsonl", "hard.jsonl")
    os.symlink(tmp_path, "sub/back")
    return tmp_path


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


SPELLINGS = {
    "same": "in.jsonl",
    "dot": "./in.jsonl",
    "absolute": "{folder}/in.jsonl",
    "up": "sub/../in.jsonl",
    "symlink": "link.jsonl",
    "hard link": "hard.jsonl",
    "linked folder": "sub/back/in.jsonl",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("command", RECORDS)
def test_an_input_is_no_output(command: str, spelling: str, folder: Path):
    before = content(folder)
    path = SPELLINGS[spelling].format(folder=folder)
    for given, out in (("in.jsonl", path), (path, "in.jsonl")):
        with pytest.raises(InputError, match=REFUSED):
            RECORDS[command](given, out)
    assert content(folder) == before


DERIVED = [
    *((command, "out.rejected.jsonl") for command in RECORDS if command != "score"),
    *((command, "out.jsonl.tmp") for command in RECORDS),
    ("generate", "out.jsonl.partial"),
]


@pytest.mark.parametrize(("command", "name"), DERIVED)
def test_an_input_is_no_file_beside_the_output(command: str, name: str, folder: Path):
    os.link("in.jsonl", name)
    before = content(folder)
    with pytest.raises(InputError, match=REFUSED):
        RECORDS[command](name, "out.jsonl")
    assert content(folder) == before


@pytest.mark.parametrize(
    ("source", "root"),
    [
        ("shards/train/in.jsonl", None),
        ("shards/train/deep/in.jsonl", None),
        ("sub/back/shards/train/in.jsonl", None),
        ("shards/train.partial/in.jsonl", None),
        ("shards/train.old-00c0ffee/in.jsonl", None),
        ("in.jsonl", "shards/train"),
        ("in.jsonl", "shards/train/images"),
    ],
)
def test_shards_do_not_replace_the_folder_of_their_source(
    source: str, root: str | None, folder: Path
):
    turns = [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "+"}]
    (folder / "in.jsonl").write_text(json.dumps({"conversations": turns}) + "\n")
    shard.main(["--train", "in.jsonl", "--out", "shards", "--num_shards", "1"])
    if not Path(source).exists():
        Path(source).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy("in.jsonl", source)
    before = content(folder)
    arguments = ["--train", source, "--out", "shards", "--num_shards", "1", "--overwrite"]
    with pytest.raises(InputError, match=REFUSED):
        shard.main([*arguments, "--image_root", root] if root else arguments)
    assert content(folder) == before


def evaluated(test: str, out: str, model: str = "m", meta: str | None = None) -> None:
    chosen = {"meta_json_file": meta, "aggregation_function": "meta"} if meta else {}
    evaluate(EvaluateConfig(model=[model], test_json_file=test, out=out, **chosen))


MODEL = "runs/a/export"
FOLDERS: dict[str, Callable[[], object]] = {
    "test is scores": lambda: evaluated("runs/e/scores.jsonl", "runs/e"),
    "test is rejected": lambda: evaluated("runs/e/rejected.jsonl", "./runs/e"),
    "test in parts": lambda: evaluated("runs/e/parts/test.jsonl", "runs/a/../e"),
    "meta is scores": lambda: evaluated("in.jsonl", "runs/e", meta="runs/e/scores.jsonl"),
    "evaluated into the model": lambda: evaluated("in.jsonl", MODEL, f"x={MODEL}"),
    "evaluated into the run": lambda: evaluated("in.jsonl", "runs/a", MODEL),
    "scored into the model": lambda: score_file(
        ScoreConfig(model=MODEL, input="in.jsonl", out=f"{MODEL}/config.json")
    ),
    "evaluated into the run's model": lambda: evaluated("in.jsonl", MODEL, "runs/a"),
    "scored into the run's model": lambda: score_file(
        ScoreConfig(model="runs/a", input="in.jsonl", out=f"{MODEL}/s.jsonl")
    ),
    "run is the model of a run": lambda: train(reward_model="runs/a", weights_path=MODEL),
    "parts": lambda: score_file(
        ScoreConfig(input="runs/s.jsonl.parts/rank0.jsonl", out="runs/s.jsonl")
    ),
    "export over the model": lambda: launch("export").main(
        [f"--model={MODEL}", "--output_dir=runs/a/export/"]
    ),
    "export of what it clears": lambda: launch("export").main(
        ["--model=runs/x.old", "--output_dir=runs/x"]
    ),
    "export around the model": lambda: launch("export").main(
        [f"--model={MODEL}", "--output_dir=runs"]
    ),
    "run is the model": lambda: train(reward_model=MODEL, weights_path=f"./{MODEL}"),
    "run exports over the model": lambda: train(reward_model=MODEL, weights_path="runs/a"),
    "run clears the model": lambda: train(reward_model="runs/y/export.new", weights_path="runs/y"),
    "run is the shards": lambda: train(train_json_file="runs/t", weights_path="runs/t"),
    "run is the meta shards": lambda: train(meta_json_file="runs/t/", weights_path="sub/../runs/t"),
    "data in the export": lambda: train(train_json_file=f"{MODEL}/t.json", weights_path="runs/a"),
    "weights in the export": lambda: train(
        reweighter="fixed", instance_weights="runs/a/export/t.json", weights_path="sub/../runs/a"
    ),
    "first weights in the export": lambda: train(
        initial_weights="runs/a/export/t.json", weights_path="runs/a"
    ),
    "page is metrics": lambda: write_run_report(
        [Path("runs/a")], Path("runs/a/metrics.jsonl"), None
    ),
    "page is a second run's": lambda: write_run_report(
        [Path("runs/b"), Path("runs/a")], Path("runs/b/../a/config.yaml"), None
    ),
    "page is results": lambda: write_run_report(
        [Path("runs/a")], Path("./in.jsonl"), Path("in.jsonl")
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_of_inputs_is_no_folder_of_outputs(case: str, folder: Path):
    files = [
        *("a/metrics.jsonl", "a/config.yaml", "b/metrics.jsonl", "t/manifest.json"),
        *("a/export/config.json", "a/export/t.json", "x.old/config.json"),
        *("y/export.new/config.json", "e/parts/test.jsonl", "s.jsonl.parts/rank0.jsonl"),
        *("e/scores.jsonl", "e/rejected.jsonl"),
    ]
    for name in files:
        path = folder / "runs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text((folder / "in.jsonl").read_text())
    before = content(folder)
    with pytest.raises(InputError, match=REFUSED):
        FOLDERS[case]()
    assert content(folder) == before


def test_what_lies_beside_or_under_is_no_input(folder: Path):
    for name in ("out", "out/deep", "model"):
        Path(name).mkdir()
    refuse_overwriting(
        [Path("out/a.jsonl"), Path("out/deep"), Path("new/b"), Path("model/c")],
        ["in.jsonl", "model", "out", "hub/name", "", None],
        into=Path("sub"),
    )
