"""The page about a demo: which solutions were picked, what the weights found, where time went."""

import math
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np

from dreamprm_dist.data.shards import ShardFolder
from dreamprm_dist.errors import InputError
from dreamprm_dist.evaluation.results import read_results
from dreamprm_dist.report.html import (
    Cell,
    axes_of,
    html_table,
    notes,
    svg_figure,
    whole_page,
    wrap,
)
from dreamprm_dist.report.questions import question_cards
from dreamprm_dist.report.runs import Run, read_json
from dreamprm_dist.report.style import (
    BLUE,
    PLOT_STYLE,
    VERMILION,
    decimal,
    label_of,
    method_of,
    number,
    ordered,
    percent,
    plot_label,
    points,
)
from dreamprm_dist.report.training import (
    LOSSES,
    details_settings,
    figure_loss,
    figure_quantiles,
    figure_seconds,
)
from dreamprm_dist.report.weights import figure_histogram, instances


@matplotlib.rc_context(PLOT_STYLE)
def write_demo_report(folder: Path) -> Path:
    """Write `report.html` into a folder that `launch/demo.py` made; returns its path.

    Raises:
        InputError: there is no `summary.json`, or a file is not what it should be.
    """
    summary = read_json(folder / "summary.json")
    if not isinstance(summary, dict):
        raise InputError(f"{folder} has no summary.json; name a folder that launch/demo.py made")
    # The runs of several seeds lie in a folder for each; its first one shows what is in all.
    home = next(iter(sorted(folder.glob("seed-*/"))), folder)
    found = {p.parent.name for n in ("metrics.jsonl", "config.yaml") for p in folder.glob(f"*/{n}")}
    runs = [Run.read(folder / name) for name in ordered(found)]
    truth = read_json(home / "data" / "truth.json")
    flipped = np.array([bool(t["flipped"]) for t in truth or []], dtype=bool)
    accuracy, auc = summary.get("accuracy", {}), summary.get("noise_auc", {})
    differences, seeds = _differences(summary), summary.get("seeds", [])
    # Other lengths mean that records were rejected, and sample IDs are not those of the truth.
    weighted = [r for r in runs if 0 < len(r.weights) == len(flipped)]
    missing = [text for run in runs if run.name != "evaluation" for text in run.missing()]
    sections = {
        "What is missing": [notes(missing)],
        "Key figures": [summary_tiles(summary, differences, flipped)],
        "The task: handwritten digits": task(home, flipped),
        "Which solution is picked": [
            table_accuracy(accuracy),
            wrap("stack", figure_accuracy(accuracy) + table_differences(differences)),
        ],
        "Seeds": [
            table_seeds(seeds, "accuracy", "Right picks by seed", "Picked by", percent),
            table_seeds(seeds, "noise_auc", "Noise AUC by seed", "Ranked by", decimal),
        ],
        "Clean and flipped instances": [
            *(figure_weights(run, flipped) for run in weighted),
            table_noise_auc(auc),
        ],
        **{
            f"Training solutions at the ends, {label_of(run.name).lower()}": [
                ends(run, home / "shards" / "train" / "train", flipped)
            ]
            for run in weighted[:1]
        },
        "Losses and weights over iterations": [
            *(figure_loss(runs, loss) for loss in LOSSES),
            *map(figure_quantiles, runs),
        ],
        "Where time goes": [figure_seconds(runs)],
        "Settings": [wrap("wide", "".join(map(details_settings, runs)))],
    }
    page = whole_page(
        folder.resolve().name,
        "What learned instance weights are worth",
        _verdict(accuracy, auc, differences, len(seeds)),
        sections,
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _differences(summary: dict) -> dict[str, tuple[float, ...]]:
    """(mean, low, high) by name."""
    return {
        name: tuple(number(value[bound]) for bound in ("mean", "low", "high"))
        for name, value in summary.get("differences", {}).items()
    }


def _gain(accuracy: dict, differences: dict) -> tuple[float, ...]:
    """Instance table minus baseline, with its interval if there is one."""
    plain = number(accuracy.get("instance_table")) - number(accuracy.get("baseline"))
    return differences.get("instance_table_minus_baseline", (plain,))


def _verdict(accuracy: dict, auc: dict, differences: dict, seeds: int) -> str:
    gain, interval = (values := _gain(accuracy, differences))[0], values[1:]
    sentences = []
    if math.isfinite(gain) and {"instance_table", "baseline"} <= {*accuracy}:
        text = (
            f"With learned instance weights the PRM picks a right solution for "
            f"{percent(accuracy.get('instance_table'))} of the questions, without them for "
            f"{percent(accuracy.get('baseline'))}: {100 * abs(gain):.1f} percentage points "
            f"{'more' if gain >= 0 else 'fewer'}"
        )
        text += " (95% interval {} to {})".format(*map(points, interval)) if interval else ""
        sentences.append(text + (f", over {seeds} seeds." if seeds else "."))
        if interval and interval[0] <= 0 <= interval[1]:
            sentences.append("The interval includes zero: this alone shows no difference.")
    if math.isfinite(found := number(auc.get("instance_table"))):
        sentences.append(
            f"A clean training instance outweighs one with flipped labels in {found:.0%} of all "
            f"pairs (noise AUC {found:.2f}; 0.50 is chance)."
        )
    return " ".join(sentences) or "This folder holds no accuracies to compare."


def task(folder: Path, flipped: np.ndarray) -> list[str]:
    """What the demo's data are, and the first test questions with what was made of them."""
    lines = [
        "The images are real handwritten digits, 1,797 of scikit-learn's; training, meta and test "
        "questions are about different ones. A question (even or odd? larger than four?) comes "
        "with solutions in three steps: the digit that was read, what follows from it, the answer.",
    ]
    if len(flipped):
        lines.append(
            f"The training labels are noisy on purpose: of {len(flipped):,} solutions "
            f"{flipped.sum():,} have every label flipped. The meta set is small and clean."
        )
    evaluation, data = folder / "evaluation", folder / "data"
    if not (path := evaluation / "results.json").is_file():
        return [notes([*lines, f"Questions cannot be shown: there is no {path}."])]
    cards = question_cards(
        read_results(path), evaluation / "scores.jsonl", data / "test.json", data
    )
    return [notes(lines), cards]


def ends(run: Run, shards: Path, flipped: np.ndarray) -> str:
    """The most raised and most lowered training solutions, and which of them were flipped."""
    truth = [
        "In truth: every label is flipped." if f else "In truth: labels as made." for f in flipped
    ]
    try:
        return instances(run, ShardFolder(shards), truth)
    except (InputError, OSError) as error:
        return notes([f"Training solutions cannot be shown: {error}."])


def summary_tiles(summary: dict, differences: dict, flipped: np.ndarray) -> str:
    accuracy, auc = summary.get("accuracy", {}), summary.get("noise_auc", {})
    tiles = {
        "right picks, instance table": percent(accuracy.get("instance_table")),
        "percentage points over the baseline": points(_gain(accuracy, differences)[0]),
        "noise AUC of the weights": decimal(auc.get("instance_table")),
        "test questions": decimal(summary.get("num_questions"), 0),
        "training instances": decimal(len(flipped) or None, 0),
        "of them with flipped labels": percent(flipped.mean() if len(flipped) else None),
        "minutes in all": decimal(number(summary.get("seconds")) / 60, 1),
    }
    shown = {name: value for name, value in tiles.items() if value != "–"}
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in shown.items())
    return items and f'<dl class="tiles wide">{items}</dl>'


def table_accuracy(accuracy: dict) -> str:
    first = number(accuracy.get("first"))
    return html_table(
        "Questions with a right pick, and percentage points over the first candidate",
        ("Picked by", "Right", "Over first"),
        [(_method(n), percent(accuracy[n]), points(accuracy[n], first)) for n in ordered(accuracy)],
    )


def _method(name: str) -> Cell:
    label, explanation, _ = method_of(name)
    return label, explanation


def table_differences(differences: dict) -> str:
    rows = [
        (" − ".join(map(label_of, name.split("_minus_"))), *map(points, values))
        for name, values in differences.items()
    ]
    caption = "Differences between right picks in percentage points, with 95% intervals"
    return html_table(caption, ("Difference", "Mean", "Low", "High"), rows)


def table_seeds(seeds: list[dict], key: str, caption: str, first: str, shown: Callable) -> str:
    """Methods down, seeds across: `accuracy` or `noise_auc`, formatted by `shown`."""
    names = ordered({name for seed in seeds for name in seed.get(key, {})})
    rows = [
        (_method(name), *(shown(seed.get(key, {}).get(name)) for seed in seeds)) for name in names
    ]
    head = (f"Seed {seed.get('seed', '–')}" for seed in seeds)
    return html_table(caption, (first, *head), rows)


def table_noise_auc(auc: dict) -> str:
    return html_table(
        "Noise AUC: how often a clean instance ranks above a flipped one; 0.50 is chance",
        ("Ranked by", "AUC"),
        [(_method(name), decimal(auc[name])) for name in ordered(auc)],
    )


def figure_accuracy(accuracy: dict) -> str:
    values = {n: 100 * number(accuracy[n]) for n in ordered(accuracy)}
    values = {name: value for name, value in values.items() if math.isfinite(value)}
    if not values:
        return ""
    figure, axes = axes_of(0.6 + 0.3 * len(values))
    rows, colors = range(len(values)), [method_of(name)[2] for name in values]
    bars = axes.barh(rows, [*values.values()], color=colors, height=0.7)
    axes.set_yticks(rows, map(plot_label, values))
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.set(xlim=(0, 100), xlabel="right picks, %")
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    return svg_figure(figure, "Right picks", "No choice can be right more often than the oracle.")


def figure_weights(run: Run, flipped: np.ndarray) -> str:
    label = f"Weights, {label_of(run.name).lower()}"
    groups, styles, medians = {}, {}, []
    for name, mask, color in (("clean", ~flipped, BLUE), ("flipped", flipped, VERMILION)):
        values = run.weights[mask]
        group = f"{name} ({len(values)})"
        groups[group], styles[group] = values, {"color": color}
        medians.append(f"{name} {decimal(float(np.median(values)) if len(values) else None)}")
    return figure_histogram(groups, styles, label, f"{label}. Medians: {', '.join(medians)}.")
