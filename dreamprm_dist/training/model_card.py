"""The model card of an exported PRM: what it is, its data, its settings, what was measured."""

from collections.abc import Mapping

DATA_FLAGS = ("train_json_file", "meta_json_file", "max_patch_num", "label_context")
CARD_METRICS = ("iteration", "epoch", "lower_loss", "weighted_loss", "meta_loss", "weight_mean")


def model_card(
    settings: Mapping[str, object],
    metrics: Mapping[str, float] | None = None,
    results: Mapping | None = None,
) -> str:
    """Markdown with the metadata block that model hubs read.

    Args:
        settings: the run's flags and their values, as in its `config.yaml`; may be empty.
        metrics: the last line of its `metrics.jsonl`.
        results: of an evaluation `test_json_file`, `num_questions` and `accuracy`: by method, and
            under `prm` by aggregation.
    """
    base = settings.get("reward_model")
    lines = ["---", "library_name: transformers", "pipeline_tag: image-text-to-text"]
    lines += [f"base_model: {base}"] if base else []
    lines += ["---", "", "# Process reward model", ""]
    lines += [
        f"{_origin(settings)} It reads an image, a question and a solution step by step; a step's "
        "score is the probability of `+` after it, at the last token of "
        "`<|im_start|>assistant\\n`.",
        "",
    ]
    data = {name: settings[name] for name in DATA_FLAGS if name in settings}
    measured = {name: metrics[name] for name in CARD_METRICS if metrics and name in metrics}
    sections = {"Data": data, "Settings": settings, "Metrics": measured, "Best-of-N": _row(results)}
    for title, values in sections.items():
        if values:
            lines += [f"## {title}", "", f"| {title.lower()} | value |", "|---|---|"]
            lines += [f"| {name} | `{value}` |" for name, value in values.items()] + [""]
    return "\n".join(lines)


def _origin(settings: Mapping[str, object]) -> str:
    if not settings:
        return "Exported by dreamprm_dist from a folder that does not say how it was trained."
    if settings.get("retrain") or settings.get("baseline"):
        return "Trained by dreamprm_dist with plain fine-tuning."
    return (
        "Trained by dreamprm_dist with bi-level optimisation, a learned weight per instance "
        f"({settings.get('reweighter')})."
    )


def _row(results: Mapping | None) -> dict[str, object]:
    if not results:
        return {}
    accuracy = results["accuracy"]
    row = {"test file": results["test_json_file"], "questions": results["num_questions"]}
    row |= {
        name.replace("_", " "): f"{accuracy[name]:.1%}"
        for name in ("first", "random", "self_consistency", "oracle")
    }
    return row | {f"PRM, {name}": f"{value:.1%}" for name, value in accuracy["prm"].items()}
