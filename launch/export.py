"""Write a PRM in either InternVL3 layout, with tokenizer, image processor and model card.

    python launch/export.py --model runs/instance_table/export --layout original --output_dir out

`transformers` is what `InternVLForConditionalGeneration` reads, `original` what
`InternVLChatModel`, vLLM and other programs for OpenGVLab's checkpoints read. The model may be a
run's export or any InternVL3 checkpoint, in any of the two.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from dreamprm_dist.errors import InputError
from dreamprm_dist.evaluation.results import read_results
from dreamprm_dist.files import whole_folder, whole_lines
from dreamprm_dist.flags import flag, parse_args, run
from dreamprm_dist.prm.model import load_prm, load_tokenizer
from dreamprm_dist.training.export import INSTANCE_WEIGHTS, save_model
from dreamprm_dist.training.model_card import model_card


@dataclass
class ExportConfig:
    """Everything `launch/export.py` is told."""

    model: str = flag("./weights/export", "Local folder or hub name of the PRM.")
    output_dir: str = flag("./export", "Folder to write; must not exist.")
    layout: Literal["transformers", "original"] = flag("transformers", "Layout to write.")
    precision: Literal["bf16", "fp32"] = flag("bf16", "Precision to write the weights in.")
    results: str | None = flag(None, "results.json of an evaluation, for the model card.")


def main(argv: list[str] | None = None) -> None:
    (config,) = parse_args((ExportConfig,), argv, "Write a PRM in either InternVL3 layout.")
    out, source = Path(config.output_dir), Path(config.model)
    if out.exists():
        raise InputError(f"{out} already exists; choose another output_dir or remove it")
    card = model_card(*_of_run(source.parent), _results(config.results, config.model))
    prm, tokenizer = load_prm(config.model, config.precision), load_tokenizer(config.model)
    with whole_folder(out) as folder:
        save_model(folder, prm, tokenizer, original=config.layout == "original")
        (folder / "README.md").write_text(card, encoding="utf-8")
        if (source / INSTANCE_WEIGHTS).is_file():
            shutil.copy(source / INSTANCE_WEIGHTS, folder)
    print(f"{config.model} is in {out}, {config.layout} layout, {config.precision}")


def _of_run(folder: Path) -> tuple[dict, dict | None]:
    """Settings and last metrics of the run that `folder` holds, if it holds one."""
    settings, metrics = folder / "config.yaml", folder / "metrics.jsonl"
    if not (settings.is_file() and metrics.is_file()):
        return {}, None
    lines = whole_lines(metrics)
    values = yaml.safe_load(settings.read_text(encoding="utf-8"))
    return values, json.loads(lines[-1]) if lines else None


def _results(path: str | None, model: str) -> dict | None:
    """An evaluation as the model card shows it: with this PRM's accuracies."""
    if path is None:
        return None
    results = read_results(Path(path))
    models = {label: Path(folder).resolve() for label, folder in results.models.items()}
    label = next((label for label in models if models[label] == Path(model).resolve()), None)
    if label is None:
        evaluated = ", ".join(results.models.values())
        raise InputError(f"{path} has no accuracy of {model}; it is an evaluation of {evaluated}")
    return {
        "test_json_file": results.test_json_file,
        "num_questions": results.num_questions,
        "accuracy": results.accuracies() | {"prm": results.accuracies(label)},
    }


if __name__ == "__main__":
    run(main)
