"""Write a PRM in either InternVL3 layout, with tokenizer, image processor and model card.

    python launch/export.py --model runs/instance_table/export --layout original --out out

`transformers` is what `InternVLForConditionalGeneration` reads, `original` what
`InternVLChatModel`, vLLM and other programs for OpenGVLab's checkpoints read. The model may be a
run, its export or any InternVL3 checkpoint, in any of the two.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from dreamprm_dist.errors import InputError
from dreamprm_dist.evaluation.results import read_results
from dreamprm_dist.files import refuse_overwriting, whole_folder, whole_lines
from dreamprm_dist.flags import flag, parse_args, run
from dreamprm_dist.prm.layout import to_original_config
from dreamprm_dist.prm.model import load_prm, load_tokenizer
from dreamprm_dist.prm.model_folder import CONFIG, EXPORT, fetch_model, resolve_model
from dreamprm_dist.training.export import INSTANCE_WEIGHTS, export_prm
from dreamprm_dist.training.model_card import ModelCard, origin


@dataclass
class ExportConfig:
    """Everything `launch/export.py` is told."""

    model: str = flag("./weights/export", "Local folder, run folder or hub name of the PRM.")
    out: str = flag("./export", "Folder to write; must not exist.", aliases=["output_dir"])
    layout: Literal["transformers", "original"] = flag("transformers", "Layout to write.")
    precision: Literal["same", "bf16", "fp32"] = flag(
        "same", "Precision to write the weights in; same: the model's."
    )
    results: str | None = flag(None, "results.json of an evaluation, for the model card.")


def main(argv: list[str] | None = None) -> None:
    (config,) = parse_args((ExportConfig,), argv, "Write a PRM in either InternVL3 layout.")
    out, original = Path(config.out), config.layout == "original"
    refuse_overwriting([out], [config.model, config.results])
    if out.exists():
        raise InputError(f"{out} already exists; choose another --out or remove it")
    source = fetch_model(config.model)
    card = ModelCard.read(source) or _card_of_run(source.parent, config.model)
    if config.results:
        card.add_results(_results(config.results, config.model))
    precision = _precision(source) if config.precision == "same" else config.precision
    prm, tokenizer = load_prm(config.model, precision), load_tokenizer(config.model)
    if original:  # which refuses some models: before anything is written
        to_original_config(prm.model.config)
    with whole_folder(out) as folder:
        export_prm(folder, prm, tokenizer, card, original)
        if (source / INSTANCE_WEIGHTS).is_file():
            shutil.copy(source / INSTANCE_WEIGHTS, folder)
    print(f"{config.model} is in {out}, {config.layout} layout, {precision}")


def _card_of_run(folder: Path, model: str) -> ModelCard:
    """A card for a model that has none of ours; it knows the run that `folder` holds, if any."""
    values: dict = {}
    metrics = None
    settings, log = folder / "config.yaml", folder / "metrics.jsonl"
    if settings.is_file() and log.is_file():
        values = yaml.safe_load(settings.read_text(encoding="utf-8")) or {}
        lines = whole_lines(log)
        metrics = json.loads(lines[-1]) if lines else None
    return ModelCard.of_run(values, metrics, origin(values.get("reward_model", model)))


def _precision(folder: Path) -> str:
    """The narrowest precision that holds the weights as they are."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    return "bf16" if config.get("dtype", config.get("torch_dtype")) == "bfloat16" else "fp32"


def _results(path: str, model: str) -> dict:
    """An evaluation as the model card shows it: with this PRM's accuracies."""
    results = read_results(Path(path))
    prm = Path(resolve_model(model)).resolve()
    label = next(
        (
            label
            for label, name in results.models.items()
            if prm in (Path(name).resolve(), Path(name, EXPORT).resolve())
        ),
        None,
    )
    if label is None:
        evaluated = ", ".join(results.models.values())
        raise InputError(f"{path} has no accuracy of {model}; it is an evaluation of {evaluated}")
    chosen = {"aggregation": results.prms[label].aggregation, "chosen_on": results.chosen_on}
    return {
        "test_json_file": results.test_json_file,
        "num_questions": results.num_questions,
        "accuracy": results.accuracies() | {"prm": results.accuracies(label)},
    } | (chosen if results.meta_accuracy else {})


if __name__ == "__main__":
    run(main)
