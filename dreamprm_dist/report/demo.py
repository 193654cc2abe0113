"""The page about a demo: which solutions were picked, what the weights found, where time went."""

from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np

from dreamprm_dist.data.shards import ShardFolder
from dreamprm_dist.errors import InputError
from dreamprm_dist.evaluation.results import read_results
from dreamprm_dist.report.alternatives import free_baselines, meta_sizes, other_model
from dreamprm_dist.report.html import (
    html_table,
    notes,
    whole_page,
    wrap,
)
from dreamprm_dist.report.questions import question_cards
from dreamprm_dist.report.runs import Run, read_json
from dreamprm_dist.report.style import (
    BLUE,
    METHODS,
    PLOT_STYLE,
    VERMILION,
    decimal,
    label_of,
    number,
    ordered,
    percent,
)
from dreamprm_dist.report.training import (
    LOSSES,
    details_settings,
    figure_loss,
    figure_quantiles,
    figure_seconds,
)
from dreamprm_dist.report.weights import figure_histogram, instances
from dreamprm_dist.report.worth import (
    Comparison,
    figure_methods,
    is_sized,
    method_cell,
    table_differences,
    table_methods,
    tiles,
    verdict,
)

# Runs whose curves, weights and settings are shown; of many more no plot could be read.
MAIN = ("cold_start", "baseline", "baseline_plus_meta", "instance_table", "table_plus_meta")


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
    found = {p.parent.name for n in ("metrics.jsonl", "config.yaml") for p in home.glob(f"*/{n}")}
    runs = [Run.read(home / name) for name in ordered(found)]
    main = [run for run in runs if run.name in MAIN or not _known(run.name)]
    truth = read_json(home / "data" / "truth.json")
    flipped = np.array([bool(t["flipped"]) for t in truth or []], dtype=bool)
    comparison = Comparison.read(summary)
    # Other lengths mean that records were rejected, and sample IDs are not those of the truth.
    weighted = [r for r in main if 0 < len(r.weights) == len(flipped)]
    missing = [text for run in runs if run.name != "evaluation" for text in run.missing()]
    sections = {
        "What is missing": [notes(missing)],
        "Key figures": [summary_tiles(summary, comparison, flipped)],
        "Which solution is picked": [
            wrap("wide", table_methods(comparison)),
            figure_methods(comparison),
            table_differences(comparison),
        ],
        "What the size of the meta set changes": meta_sizes(comparison),
        "Free baselines": free_baselines(comparison),
        "The weights with another model": other_model(comparison),
        "Seeds": [
            table_seeds(comparison.seeds, "accuracy", "Right picks by seed", "Picked by", percent),
            table_seeds(comparison.seeds, "noise_auc", "Noise AUC by seed", "Ranked by", decimal),
        ],
        "The task: handwritten digits": task(home, flipped),
        "Clean and flipped instances": [
            *(figure_weights(run, flipped) for run in weighted),
            table_noise_auc(comparison),
        ],
        **{
            f"Training solutions at the ends, {label_of(run.name).lower()}": [
                ends(run, home / "shards" / "train" / "train", flipped)
            ]
            for run in weighted[:1]
        },
        "Losses and weights over iterations": [
            notes(_left_out(home, len(runs) - len(main))),
            *(figure_loss(main, loss) for loss in LOSSES),
            *map(figure_quantiles, main),
        ],
        "Where time goes": [figure_seconds(main)],
        "Settings": [wrap("wide", "".join(map(details_settings, main)))],
    }
    page = whole_page(
        folder.resolve().name,
        "What learned instance weights are worth",
        verdict(comparison),
        sections,
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _known(name: str) -> bool:
    return name in METHODS or is_sized(name)


def _left_out(home: Path, runs: int) -> list[str]:
    """A sentence where this page does not show all runs of the folder."""
    if not runs:
        return []
    return [
        f"Of the runs in {home.name} the main ones; launch/report.py makes a page about any of "
        f"the {runs} others."
    ]


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


def summary_tiles(summary: dict, comparison: Comparison, flipped: np.ndarray) -> str:
    figures = tiles(comparison) | {
        "test questions": decimal(summary.get("num_questions"), 0),
        "training instances": decimal(len(flipped) or None, 0),
        "of them with flipped labels": percent(flipped.mean() if len(flipped) else None),
        "minutes in all": decimal(number(summary.get("seconds")) / 60, 1),
    }
    shown = {name: value for name, value in figures.items() if value != "–"}
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in shown.items())
    return items and f'<dl class="tiles wide">{items}</dl>'


def table_seeds(seeds: list[dict], key: str, caption: str, first: str, shown: Callable) -> str:
    """Methods down, seeds across: `accuracy` or `noise_auc`, formatted by `shown`."""
    names = ordered({n for seed in seeds for n in seed.get(key, {}) if not is_sized(n)})
    rows = [
        (label_of(name), *(shown(seed.get(key, {}).get(name)) for seed in seeds)) for name in names
    ]
    head = (f"Seed {seed.get('seed', '–')}" for seed in seeds)
    return html_table(caption, (first, *head), rows)


def table_noise_auc(comparison: Comparison) -> str:
    head, lowest = ["Ranked by", "AUC"], comparison.lowest_auc
    rows = [
        (method_cell(name), decimal(value), *([decimal(lowest.get(name))] if lowest else []))
        for name in ordered(comparison.auc)
        if (value := comparison.auc[name]) is not None and not is_sized(name)
    ]
    return html_table(
        "Noise AUC: how often a clean instance ranks above a flipped one; 0.50 is chance",
        head + (["Lowest of the seeds"] if lowest else []),
        rows,
    )


def figure_weights(run: Run, flipped: np.ndarray) -> str:
    label = f"Weights, {label_of(run.name).lower()}"
    groups, styles, medians = {}, {}, []
    for name, mask, color in (("clean", ~flipped, BLUE), ("flipped", flipped, VERMILION)):
        values = run.weights[mask]
        group = f"{name} ({len(values)})"
        groups[group], styles[group] = values, {"color": color}
        medians.append(f"{name} {decimal(float(np.median(values)) if len(values) else None)}")
    return figure_histogram(groups, styles, label, f"{label}. Medians: {', '.join(medians)}.")
