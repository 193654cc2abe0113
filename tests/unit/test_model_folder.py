"""What the name of a model stands for, and which of its files are read."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dreamprm_dist.errors import InputError
from dreamprm_dist.evaluation.scoring_config import ScoringConfig
from dreamprm_dist.prm import layout
from dreamprm_dist.prm.model import load_prm, load_tokenizer
from dreamprm_dist.prm.model_folder import INDEX, read_state, resolve_model

A, B, C, OLD = (torch.full((2,), float(value)) for value in (1, 2, 3, 9))


def write(folder: Path, files: dict[str, dict], index: dict[str, str] | None) -> Path:
    for name, tensors in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        save_file(tensors, folder / name)
    if index is not None:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
GOOD = {"a": ONE, "b": TWO}


@pytest.mark.parametrize(
    ("files", "index"),
    [
        ({ONE: {"a": A}, TWO: {"b": B}}, GOOD),
        ({"model.safetensors": {"a": A, "b": B}}, None),
        ({"model.safetensors": {"a": A, "b": B}}, {"a": "model.safetensors"}),
        ({"x.safetensors": {"a": A}, "y.b.safetensors": {"b": B}}, None),  # index below
        (
            {"part/one.safetensors": {"a": A}, TWO: {"b": B}},
            {"a": "part/one.safetensors", "b": TWO},
        ),
        # Of an earlier save: more shards, another cut, a single file, other tensors.
        ({ONE: {"a": A}, TWO: {"b": B}, "model-00003-of-00003.safetensors": {"a": OLD}}, GOOD),
        ({ONE: {"a": A, "b": OLD}, TWO: {"b": B}}, GOOD),
        ({ONE: {"a": A}, TWO: {"b": B, "a": OLD}}, GOOD),
        ({ONE: {"a": A}, TWO: {"b": B}, "model.safetensors": {"a": OLD, "b": A, "c": C}}, GOOD),
        ({ONE: {"a": A}, TWO: {"b": B}, "model-00001-of-00001.safetensors": {"c": OLD}}, GOOD),
        ({ONE: {"a": A}, TWO: {"b": B}, "consolidated.safetensors": {"a": OLD}}, GOOD),
    ],
)
def test_the_index_decides(files, index, tmp_path: Path) -> None:
    if "x.safetensors" in files:
        index = {"a": "x.safetensors", "b": "y.b.safetensors"}
    state = read_state(write(tmp_path, files, index))
    assert state.keys() == {"a", "b"}
    assert torch.equal(state["a"], A) and torch.equal(state["b"], B)


def test_a_single_file_beside_the_index_is_named(tmp_path: Path, caplog) -> None:
    files = {ONE: {"a": A}, TWO: {"b": B}}
    with caplog.at_level(logging.WARNING, "dreamprm_dist"):
        read_state(write(tmp_path, files, GOOD))
        assert not caplog.messages
        read_state(write(tmp_path, {"model.safetensors": {"a": OLD}}, None))
    assert "model.safetensors is not read" in caplog.messages[0]


SHARDS = {ONE: {"a": A}, TWO: {"b": B}}


@pytest.mark.parametrize(
    ("files", "index", "says"),
    [
        ({ONE: {"a": A}}, GOOD, f"not there; fetch {TWO}"),
        ({"model.safetensors": {"a": A}}, GOOD, f"not there; fetch {ONE}, {TWO}"),
        ({ONE: {"a": A}, TWO: {"c": C}}, GOOD, f"tensors that are not there: b in {TWO}"),
        ({ONE: {"a": A, "b": B}, TWO: {"c": C}}, GOOD, f"b in {TWO}"),
        (SHARDS, None, "no safetensors file named model.safetensors .*it has model-00001"),
        ({}, None, "pickled weights"),
        (SHARDS, {"a": ONE, "b": "../other.safetensors"}, r"names '\.\./other\.safetensors'"),
        (SHARDS, {"a": ONE, "b": "x/../../other.safetensors"}, "of its own folder only"),
        (SHARDS, {"a": ONE, "b": "/etc/other.safetensors"}, "names '/etc/other.safetensors'"),
        (SHARDS, {"a": ONE, "b": "pytorch_model-2.bin"}, "names 'pytorch_model-2.bin'"),
        (SHARDS, {"a": ONE, "b": ""}, r"names '\.'"),
        (SHARDS, {"a": ONE, "b": 3}, "is no index"),
        (SHARDS, ["a"], "is no index"),
        (SHARDS, {}, "names no tensor"),
    ],
)
def test_files_that_are_no_model(files, index, says, tmp_path: Path) -> None:
    for outside in (tmp_path, tmp_path / "folder"):
        outside.mkdir(exist_ok=True)
        save_file({"b": B}, outside / "other.safetensors")
    (tmp_path / "folder" / "other.safetensors").unlink()
    (tmp_path / "folder" / "x").mkdir()
    with pytest.raises(InputError, match=says):
        read_state(write(tmp_path / "folder", files, index))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"weight_map": null}', "\xff"])
def test_an_index_that_is_broken(text: str, tmp_path: Path) -> None:
    write(tmp_path, SHARDS, None)
    (tmp_path / INDEX).write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match="is no index of tensors"):
        read_state(tmp_path)


def test_a_shard_that_is_broken(tmp_path: Path) -> None:
    write(tmp_path, SHARDS, GOOD)
    (tmp_path / TWO).write_bytes((tmp_path / TWO).read_bytes()[:-3])
    with pytest.raises(InputError, match=f"{TWO} is broken"):
        read_state(tmp_path)


@pytest.fixture(params=["transformers", "original"])
def sharded(request, tiny_prm_dir: Path, tmp_path: Path) -> Path:
    """The tiny PRM in three shards, in either layout, beside a shard and a file of other saves."""
    folder = tmp_path / "sharded"
    shutil.copytree(tiny_prm_dir, folder)
    if request.param == "original":
        prm = load_prm(str(tiny_prm_dir), "fp32").model
        layout.save_original(folder, prm.config, prm.state_dict())
    state = load_file(folder / "model.safetensors")
    parts = [dict(list(state.items())[part::3]) for part in range(3)]
    files = {f"model-0000{i}-of-00003.safetensors": part for i, part in enumerate(parts, 1)}
    old = {name: tensor + 1 for name, tensor in state.items()}
    write(folder, files, {name: file for file, part in files.items() for name in part})
    save_file(old | {"stale": A}, folder / "model-00004-of-00004.safetensors")
    save_file(old, folder / "model.safetensors")
    return folder


def test_both_layouts_go_by_the_index(sharded: Path, tiny_prm_dir: Path) -> None:
    state = load_prm(str(sharded), "fp32").state_dict()
    expected = load_prm(str(tiny_prm_dir), "fp32").state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())

    index = json.loads((sharded / INDEX).read_text())
    name = next(
        name for name in index["weight_map"] if name.endswith("layers.1.mlp.up_proj.weight")
    )
    del index["weight_map"][name]
    shard = sharded / "model-00002-of-00003.safetensors"
    for file in sharded.glob("model-*-of-00003.safetensors"):
        save_file({k: v for k, v in load_file(file).items() if k != name}, file)
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(
        InputError, match=r"missing: model\.language_model\.layers\.1\.mlp\.up_proj"
    ):
        load_prm(str(sharded), "fp32")
    shard.unlink()
    with pytest.raises(InputError, match=f"sharded: .*fetch {shard.name}"):
        load_prm(str(sharded), "fp32")


def test_names_of_other_versions_of_transformers(tiny_prm_dir: Path, tmp_path: Path) -> None:
    """Files hold `language_model.model.*`; modules, and some files, `model.language_model.*`."""
    shutil.copytree(tiny_prm_dir, tmp_path / "prm")
    state = load_prm(str(tiny_prm_dir), "fp32").model.state_dict()
    del state["lm_head.weight"]
    assert not state.keys() & load_file(tiny_prm_dir / "model.safetensors").keys()
    save_file(state, tmp_path / "prm" / "model.safetensors")
    again = load_prm(str(tmp_path / "prm"), "fp32").model.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())


@pytest.fixture
def places(tmp_path: Path, tiny_prm_dir: Path, monkeypatch) -> Path:
    """A folder with runs, models, and what people take for one; it is the working directory."""
    for run in ("done", "going", "begun"):
        (tmp_path / run / "checkpoints" / "iteration-3").mkdir(parents=True)
        (tmp_path / run / "config.yaml").write_text("seed: 1\n")
        (tmp_path / run / "checkpoints" / "iteration-3" / "manifest.json").write_text("{}")
    (tmp_path / "going" / "metrics.jsonl").write_text('{"iteration": 3}\n')
    (tmp_path / "going" / "export.new").mkdir()  # killed while it exported
    shutil.copytree(tiny_prm_dir, tmp_path / "done" / "export")
    shutil.copytree(tiny_prm_dir, tmp_path / "model")
    shutil.copytree(tiny_prm_dir, tmp_path / "model" / "export")
    (tmp_path / "evaluation").mkdir()
    for name in ("config.yaml", "results.json", "scores.jsonl", "rejected.jsonl", "z"):
        (tmp_path / "evaluation" / name).write_text("")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("done", "done/export"),
        ("done/", "done/export"),
        ("./done", "done/export"),
        ("done/export", "done/export"),
        ("model", "model"),
        ("model/export/", "model/export/"),
        ("OpenGVLab/InternVL3-1B", "OpenGVLab/InternVL3-1B"),
        ("no/such/folder", "no/such/folder"),
    ],
)
def test_a_run_stands_for_its_export(places: Path, name: str, model: str) -> None:
    assert resolve_model(name) == model
    assert resolve_model(model) == model
    if not name.startswith(("Open", "no")):
        assert resolve_model(str(places / name)) == str(places / Path(model))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("going", "is a run without an export.*--config going/config.yaml"),
        ("begun", "is a run without an export"),
        ("done/checkpoints/iteration-3", "holds checkpoints.*/done/export"),
        ("going/checkpoints/iteration-3/", "holds checkpoints.*/going/export"),
        ("done/checkpoints", "holds checkpoints.*/done/export"),
        ("evaluation", "lacks config.json .config.yaml, rejected.jsonl, results.json and 2 more"),
        ("empty", "lacks config.json .it is empty"),
        (".", "lacks config.json .begun, done, empty and 3 more"),
        ("model/model.safetensors", "is a file; give the folder"),
        ("no/such/folder", "neither a folder here nor a model of the hub"),
        ("no\nname", "neither a folder here nor a model of the hub"),
    ],
)
def test_what_is_no_model_is_said_in_a_sentence(places: Path, name: str, says: str) -> None:
    for load in (load_prm, load_tokenizer):
        with pytest.raises(InputError, match=says) as error:
            load(name)
        assert str(error.value).startswith("model ")
        assert "\n" not in str(error.value).replace(name, "")


def test_a_hub_that_is_not_within_reach(places: Path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for load in (load_prm, load_tokenizer):
        with pytest.raises(InputError, match=r"model a/b: neither .* within reach") as error:
            load("a/b")
        assert "\n" not in str(error.value)


def test_a_model_of_the_hub(places: Path, monkeypatch) -> None:
    asked = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, "*.safetensors" in allow_patterns))
        return str(places / "model" if name == "a/b" else places / "empty")

    monkeypatch.setattr("dreamprm_dist.prm.model_folder.snapshot_download", snapshot_download)
    load_tokenizer("a/b")
    load_prm("a/b", "fp32")
    assert asked == [("a/b", False), ("a/b", True)]
    with pytest.raises(InputError, match=r"a/c: .* lacks config\.json"):
        load_tokenizer("a/c")


def test_the_log_says_that_a_run_was_meant(places: Path, caplog) -> None:
    with caplog.at_level(logging.INFO, "dreamprm_dist"):
        load_prm("done/export", "fp32")
        assert not caplog.messages
        load_tokenizer("done")
        load_prm("done", "fp32")
    assert caplog.messages == ["done is a run; the model is its export, done/export"]


def test_an_evaluation_sees_that_a_runs_export_has_changed(places: Path) -> None:
    def settings() -> list:
        return ScoringConfig().settings({"x": "done"}, {}, torch.device("cpu"))["model x"]

    before = settings()
    assert settings() == before
    (places / "done" / "export" / "model.safetensors").touch()
    assert settings() != before


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "null", '{"model_type": ["internvl"]}'])
def test_a_config_that_is_broken(places: Path, text: str) -> None:
    (places / "model" / "config.json").write_text(text)
    for load in (load_prm, load_tokenizer):
        with pytest.raises(InputError, match=r"model model: its config\.json"):
            load("model")
