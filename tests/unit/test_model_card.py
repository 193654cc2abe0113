"""Model cards: valid metadata, the model that it all began with, and no folder of this machine."""

import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard as HubCard

from dreamprm_dist.training.config import parse_train_config, save_config
from dreamprm_dist.training.model_card import ModelCard, data_set_counts, origin

HUB = "OpenGVLab/InternVL3-1B"
DATA = {"training": {"ai2d": 7, "geo|170k`qa`\n# x": 5}, "meta": {"mmmu": 4}}
LEARNS = ["--reweighter", "instance_table", "--meta_json_file", "/home/me/meta", "--lr", "0.5"]


def model(folder: Path, card: str | None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    if card is not None:
        (folder / "README.md").write_text(card)
    return folder


def metadata(**facts: object) -> str:
    return f"---\n{yaml.safe_dump(facts)}---\n# Model\n"


@pytest.fixture
def folders(tmp_path: Path, monkeypatch) -> Path:
    """Models that began with each other, in the working directory."""
    model(tmp_path / "copy", metadata(base_model=HUB, license="mit"))
    model(tmp_path / "cold" / "export", metadata(base_model=str(tmp_path / "copy")))
    model(tmp_path / "table" / "export", metadata(base_model="./cold/export", license="other"))
    model(tmp_path / "net" / "export", metadata(base_model="cold"))
    model(tmp_path / "merged", metadata(base_model=[HUB, "Qwen/Qwen2.5-0.5B"]))
    model(tmp_path / "half", metadata(base_model=[HUB, "/home/me/other"]))
    model(tmp_path / "gone", metadata(base_model="/home/me/no-more", license="mit"))
    model(tmp_path / "circle", metadata(base_model="circle", license=["mit"]))
    model(tmp_path / "silent", None)
    model(tmp_path / "number", metadata(base_model=3, license={"a": 1}))
    model(tmp_path / "text", "# No metadata\n")
    model(tmp_path / "broken", "---\nbase_model: [\n---\n")
    model(tmp_path / "list", "---\n- a\n---\n")
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "config.json").write_text("{}")
    (tmp_path / "binary" / "README.md").write_bytes(b"---\n\xff\n---\n")
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        (HUB, {"base_model": HUB}),
        ("gpt2", {"base_model": "gpt2"}),
        ("copy", {"base_model": HUB, "license": "mit"}),
        ("cold/export", {"base_model": HUB, "license": "mit"}),
        ("cold", {"base_model": HUB, "license": "mit"}),
        ("table", {"base_model": HUB, "license": "other"}),
        ("net", {"base_model": HUB, "license": "mit"}),
        ("merged", {"base_model": [HUB, "Qwen/Qwen2.5-0.5B"]}),
        ("half", {}),
        ("gone", {"license": "mit"}),
        ("circle", {"license": ["mit"]}),
        ("silent", {}),
        ("number", {}),
        ("text", {}),
        ("broken", {}),
        ("list", {}),
        ("binary", {}),
        ("begun", {}),
        ("/home/me/no-more", {}),
        ("./no-more", {}),
        ("runs/cold/export", {}),
    ],
)
def test_what_a_model_began_with(folders: Path, name: str, facts: dict) -> None:
    assert origin(name) == facts
    if Path(name).is_dir():
        assert origin(str(folders / name)) == facts


def card_of(flags: list[str], data_sets=DATA, **facts: object) -> ModelCard:
    metrics = {"iteration": 7, "lower_loss": 0.25, "seconds_data": 1.0}
    return ModelCard.of_run(parse_train_config(flags).as_dict(), metrics, facts, data_sets)


@pytest.mark.parametrize("layout", ["transformers", "original"])
def test_its_metadata_is_valid_and_it_reads_itself(tmp_path: Path, layout: str) -> None:
    flags = [*LEARNS, "--aggregation_function", "min", "--score_over", "pair"]
    flags += ["--reward_model", str(tmp_path), "--weights_path", str(tmp_path / "run")]
    card = card_of(flags, base_model=HUB, license="mit")
    text = card.text(layout)
    data = HubCard(text).data
    facts = data.to_dict()
    named = [facts[key] for key in ("base_model", "license", "library_name")]
    assert named == [HUB, "mit", "transformers"]
    assert (data.pipeline_tag, data.get("aggregation")) == ("image-text-to-text", "min")
    assert data.tags == ["process-reward-model", "dreamprm_dist"]
    lines = text.splitlines()
    for row in ("| ai2d | `7` |", "| mmmu | `4` |", "| training instances | `12` |"):
        assert row in lines
    assert "| geo\\|170k'qa' # x | `5` |" in lines
    assert "| meta_json_file | `meta` |" in lines and "| lower_loss | `0.25` |" in lines
    assert 'score_over="pair"' in text and 'aggregation="min"' in text
    assert str(tmp_path) not in text and "/home/me" not in text and "seconds_data" not in text
    (tmp_path / "README.md").write_text(text)
    again = ModelCard.read(tmp_path)
    assert again is not None and again.text(layout) == text
    assert ("InternVLChatModel" in text) == (layout == "original")


@pytest.mark.parametrize("flag", ["--retrain", "--baseline", "--reweighter=uniform"])
def test_plain_fine_tuning_names_nothing_of_a_meta_set(tmp_path: Path, flag: str) -> None:
    config = parse_train_config([flag, "--meta_json_file", "/home/me/meta"])
    text = ModelCard.of_run(config.as_dict(), None, {}, {"training": {"a": 1}}).text()
    assert "meta" not in text.replace("metadata", "") and "hypergradient" not in text
    assert "plain fine-tuning" in text and "base_model" not in text
    save_config(config, tmp_path / "config.yaml")
    assert "meta_json_file" not in (tmp_path / "config.yaml").read_text()
    again = parse_train_config(["--config", str(tmp_path / "config.yaml")])
    assert again.as_dict() | {"meta_json_file": ""} == config.as_dict() | {"meta_json_file": ""}


def test_given_weights_are_said() -> None:
    flags = ["--reweighter", "fixed", "--instance_weights", "/home/me/weights.parquet"]
    text = card_of(flags).text()
    assert "with fine-tuning on fixed weights, one for each instance." in text
    assert "| instance_weights | `weights.parquet` |" in text and "| meta_lr |" not in text


@pytest.mark.parametrize("flags", [LEARNS, ["--baseline", "--meta_validation_fraction", "0.5"]])
def test_a_meta_set_that_was_read_is_named(tmp_path: Path, flags: list[str]) -> None:
    assert "| meta_json_file |" in card_of(flags).text()
    save_config(parse_train_config(flags), tmp_path / "config.yaml")
    assert "meta_json_file" in yaml.safe_load((tmp_path / "config.yaml").read_text())


RESULTS = {
    "test_json_file": "/home/me/test.json",
    "num_questions": 3,
    "accuracy": {"first": 0.0, "random": 0.5, "self_consistency": 0.0, "oracle": 1.0}
    | {"prm": {"mean": 1.0, "last": 0.5}},
}


def test_an_evaluation_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    card = card_of(LEARNS)
    card.add_results(RESULTS)
    assert "by `mean` (that of the meta loss)" in card.text()
    card.add_results(RESULTS | {"aggregation": "last", "chosen_on": "/home/me/meta.jsonl"})
    text = card.text()
    assert "by `last` (chosen on meta.jsonl)" in text and 'aggregation="last"' in text
    assert text.count("## Best-of-N") == 1 and "| test file | `test.json` |" in text


def test_a_card_of_others_is_not_taken_for_ours(folders: Path) -> None:
    assert all(ModelCard.read(folder) is None for folder in folders.iterdir())


def test_its_example_runs_as_written(tiny_prm_dir: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tiny_prm_dir)
    for flags in (LEARNS, ["--baseline"], [*LEARNS, "--score_over", "pair"]):
        text = card_of(flags).text()
        exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], {})
        scores, best = capsys.readouterr().out.splitlines()[-2:]
        assert len(json.loads(scores)) == 2 and best[0] in "01"


def test_data_sets_are_counted() -> None:
    assert [*data_set_counts(iter("abbcbc")).items()] == [("b", 3), ("c", 2), ("a", 1)]
    assert data_set_counts([]) == {}
    assert "Data sets" not in card_of(LEARNS, {"training": {}}).text()
