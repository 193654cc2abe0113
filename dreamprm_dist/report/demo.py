"""The page about a demo: which solutions were picked, what the weights found, where time went."""

import math
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np

from dreamprm_dist.errors import InputError
from dreamprm_dist.report.html import axes_of, html_table, svg_figure, whole_page, wrap
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
    points,
)
from dreamprm_dist.report.training import (
    BANDS,
    LOSSES,
    PHASES,
    details_settings,
    figure_loss,
    figure_quantiles,
    figure_seconds,
)


@matplotlib.rc_context(PLOT_STYLE)
def write_demo_report(folder: Path) -> Path:
    """Write `report.html` into a folder that `launch/demo.py` made; returns its path.

    Raises:
        InputError: there is no `summary.json`, or a file is not what it should be.
    """
    summary = read_json(folder / "summary.json")
    if not isinstance(summary, dict):
        raise InputError(f"{folder} has no summary.json; name a folder that launch/demo.py made")
    found = {p.parent.name for n in ("metrics.jsonl", "config.yaml") for p in folder.glob(f"*/{n}")}
    runs = [Run.read(folder / name) for name in ordered(found)]
    truth = read_json(folder / "data" / "truth.json")
    flipped = np.array([bool(t["flipped"]) for t in truth or []])
    accuracy, auc = summary.get("accuracy", {}), summary.get("noise_auc", {})
    differences, seeds = _differences(summary), summary.get("seeds", [])
    # Other lengths mean that records were rejected, and sample IDs are not those of the truth.
    weighted = [r for r in runs if len(r.weights) == len(flipped) > 0]
    sections = {
        "Key figures": [summary_tiles(summary, differences, flipped)],
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
        "Losses and weights over iterations": [
            *(figure_loss(runs, loss) for loss in LOSSES),
            *(figure_quantiles(run) for run in runs if {*BANDS} <= {*run.metrics}),
        ],
        "Where time goes": [figure_seconds([r for r in runs if any(map(r.seconds, PHASES))])],
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
    """(mean, low, high) by name, wherever the summary keeps them."""
    pooled = summary.get("pooled", {})
    given = pooled | pooled.get("differences", {}) | summary.get("differences", {})
    bounds = ("mean", "low", "high")
    return {
        name: tuple(number(value[b]) for b in bounds)
        for name, value in given.items()
        if isinstance(value, dict) and value.keys() >= {*bounds}
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
        [(n, percent(accuracy[n]), points(accuracy[n], first)) for n in ordered(accuracy)],
        by_method=True,
    )


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
    rows = [(name, *(shown(seed.get(key, {}).get(name)) for seed in seeds)) for name in names]
    head = (f"Seed {seed.get('seed', '–')}" for seed in seeds)
    return html_table(caption, (first, *head), rows, by_method=True)


def table_noise_auc(auc: dict) -> str:
    return html_table(
        "Noise AUC: how often a clean instance ranks above a flipped one; 0.50 is chance",
        ("Ranked by", "AUC"),
        [(name, decimal(auc[name])) for name in ordered(auc)],
        by_method=True,
    )


def figure_accuracy(accuracy: dict) -> str:
    values = {n: 100 * number(accuracy[n]) for n in ordered(accuracy)}
    values = {name: value for name, value in values.items() if math.isfinite(value)}
    if not values:
        return ""
    figure, axes = axes_of(0.6 + 0.3 * len(values))
    labels, colors = map(label_of, values), [method_of(name)[2] for name in values]
    bars = axes.barh([*labels], [*values.values()], color=colors, height=0.7)
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.set(xlim=(0, 100), xlabel="right picks, %")
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    return svg_figure(figure, "Right picks", "No choice can be right more often than the oracle.")


def figure_weights(run: Run, flipped: np.ndarray) -> str:
    figure, axes = axes_of()
    edges, medians = np.histogram_bin_edges(run.weights[np.isfinite(run.weights)], bins=30), []
    for name, group, color in (("clean", ~flipped, BLUE), ("flipped", flipped, VERMILION)):
        values = run.weights[group]
        shares = 100 * np.histogram(values, edges)[0] / max(1, len(values))
        axes.stairs(shares, edges, color=color, alpha=0.3, fill=True)
        axes.stairs(shares, edges, color=color, linewidth=1.5, label=f"{name} ({len(values)})")
        medians.append(f"{name} {np.median(values) if len(values) else math.nan:.2f}")
    axes.set(xlabel="weight", ylabel="instances of the group, %")
    label = f"Weights, {label_of(run.name).lower()}"
    return svg_figure(figure, label, f"{label}. Medians: {', '.join(medians)}.")
