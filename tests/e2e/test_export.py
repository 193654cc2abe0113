"""`launch/export.py` as a user starts it: from one layout into the other and back."""

import importlib.util
import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
)

from dreamprm_dist.evaluation.best_of_n import CandidateScores
from dreamprm_dist.evaluation.compare import compare
from dreamprm_dist.evaluation.results import Results, write_results
from dreamprm_dist.prm.chat import IMAGE_CONTEXT
from dreamprm_dist.prm.model import load_prm, load_tokenizer
from dreamprm_dist.prm.tiling import image_tiles
from dreamprm_dist.training.export import PROCESSOR_TOKENS
from dreamprm_dist.training.model_card import ModelCard

EXPORT = Path(__file__).resolve().parents[2] / "launch" / "export.py"


def export(*flags: object) -> subprocess.CompletedProcess:
    command = [sys.executable, EXPORT, *flags]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=900)


def evaluation(scores: dict[str, list[float]]) -> Results:
    """PRMs by what they give to the two candidates of a question, of which the second is right."""
    prms = {
        label: [
            CandidateScores(0, "", i, "", [score], "AB"[i], i == 1) for i, score in enumerate(pair)
        ]
        for label, pair in scores.items()
    }
    results = compare(prms, dict.fromkeys(prms, "mean"))
    return replace(results, test_json_file="test.json")


def test_there_and_back(tiny_prm_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "export").symlink_to(tiny_prm_dir)
    settings = {"reward_model": "a/base", "train_json_file": "shards/train", "reweighter": "table"}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    (run / "metrics.jsonl").write_text('{"iteration": 7, "lower_loss": 0.25}\n{"iterat')
    # The first PRM is another one, which chooses the wrong candidate.
    results = evaluation({"unweighted": [0.9, 0.1], "table": [0.1, 0.9]})
    models = {"unweighted": "runs/baseline/export", "table": str(run / "export")}
    write_results(run / "results.json", replace(results, models=models))
    original, back = tmp_path / "original", tmp_path / "back"
    fp32 = ("--precision", "fp32")
    expected = {file.name for file in tiny_prm_dir.iterdir()} | {"README.md"}
    flags = ("--layout", "original", "--results", run / "results.json")
    done = export("--model", run, "--output_dir", original, *flags)
    assert done.returncode == 0, done.stderr
    assert f"{run} is a run; the model is its export, {run / 'export'}\n" in done.stderr
    assert done.stdout.endswith("original layout, fp32\n")  # as the model is
    assert json.loads((original / "config.json").read_text())["model_type"] == "internvl_chat"
    done = export("--model", original, "--output_dir", back, *fp32)
    assert done.returncode == 0, done.stderr
    assert ModelCard.read(back) == ModelCard.read(original)  # the card comes along

    before, after = (load_prm(str(f), "fp32").state_dict() for f in (tiny_prm_dir, back))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    text = "<|im_start|>user\nThe digit is 7.<|im_end|>\n"
    assert load_tokenizer(str(original)).encode(text) == load_tokenizer(str(back)).encode(text)
    assert {path.name for path in back.iterdir()} == expected
    assert {path.name for path in original.iterdir()} == expected - {"generation_config.json"}
    card = (original / "README.md").read_text()
    lines = (
        "base_model: a/base",
        "| train_json_file | `shards/train` |",
        "| lower_loss | `0.25` |",
    )
    lines += ("| test file | `test.json` |", "| questions | `1` |", "| random | `50.0%` |")
    assert all(line in card for line in (*lines, "| PRM, mean | `100.0%` |", "| first | `0.0%` |"))


def test_bad_input(refused, tiny_prm_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}")
    flags = ("--model", tiny_prm_dir, "--output_dir")
    assert "already exists" in refused(EXPORT, *flags, tmp_path)
    flags += (tmp_path / "out", "--results")
    assert "no results.json" in refused(EXPORT, *flags, tmp_path / "results.json")
    results = replace(evaluation({"a": [0.1, 0.9]}), models={"a": "x/export"})
    write_results(tmp_path / "other.json", results)
    assert "evaluation of x/export" in refused(EXPORT, *flags, tmp_path / "other.json")
    assert not (tmp_path / "out").exists()


def test_a_language_model_is_refused_before_anything_is_written(
    refused, tiny_prm_dir: Path, tmp_path: Path
) -> None:
    config = InternVLConfig.from_pretrained(tiny_prm_dir)
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    text = LlamaConfig(**{name: getattr(config.text_config, name) for name in sizes})
    values = config.to_dict() | {"text_config": text.to_dict(), "tie_word_embeddings": False}
    shutil.copytree(tiny_prm_dir, tmp_path / "llama")
    InternVLForConditionalGeneration(InternVLConfig(**values)).save_pretrained(tmp_path / "llama")
    flags = ("--model", tmp_path / "llama", "--layout", "original", "--output_dir")
    said = refused(EXPORT, *flags, tmp_path / "out" / "prm")
    assert "'llama'; only Qwen2" in said.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_what_transformers_alone_reads(tiny_prm_dir: Path) -> None:
    # At once as transformers writes them when it has read them: a second export is the same.
    saved = json.loads((tiny_prm_dir / "tokenizer_config.json").read_text())
    assert PROCESSOR_TOKENS.items() <= saved.items()
    assert saved["model_specific_special_tokens"] == PROCESSOR_TOKENS
    tokenizer = AutoTokenizer.from_pretrained(tiny_prm_dir)
    assert (tokenizer.start_image_token, tokenizer.context_image_token) == ("<img>", IMAGE_CONTEXT)
    assert len(tokenizer) == len(load_tokenizer(str(tiny_prm_dir)))
    processor = AutoImageProcessor.from_pretrained(tiny_prm_dir)
    image = Image.effect_noise((64, 32), 50).convert("RGB")
    file = io.BytesIO()
    image.save(file, "PNG")
    tiles = image_tiles(file.getvalue(), 12, 32)
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(torch.as_tensor(pixels), tiles, rtol=0, atol=1e-5)
    model = AutoModelForImageTextToText.from_pretrained(tiny_prm_dir)
    expected = load_prm(str(tiny_prm_dir), "fp32").model.state_dict()
    assert all(torch.equal(expected[name], t) for name, t in model.state_dict().items())
    if importlib.util.find_spec("torchvision") is None:
        with pytest.raises(ValueError, match="install `torchvision`"):
            AutoProcessor.from_pretrained(tiny_prm_dir)
