"""The learned weights of a run: their spread, data sets, and the instances at the ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
import pandas as pd

from dreamprm_dist.data.schema import QUESTION_PREFIX, SOLUTION_MARK, Turn
from dreamprm_dist.data.shards import MANIFEST, ShardFolder, shards_at
from dreamprm_dist.errors import InputError
from dreamprm_dist.report.html import axes_of, html_table, notes, svg_figure, thumbnail, wrap
from dreamprm_dist.report.runs import Run
from dreamprm_dist.report.style import (
    decimal,
    label_of,
    line_styles,
    plot_label,
    shortened,
    significant,
)

INSTANCES = 4  # shown at each end
QUESTION_TEXT, STEP_TEXT = 300, 600  # characters shown
LABELS = {"+": "labelled right (+)", "-": "labelled wrong (−)", None: "unlabelled"}


def effective_sample_size(weights: np.ndarray) -> float:
    """(sum w)^2 / sum w^2: how many instances of equal weight would count as much (Kish, 1965)."""
    squares = np.square(weights).sum()
    return float(weights.sum() ** 2 / squares) if squares else 0.0


def figure_histogram(
    groups: Mapping[str, np.ndarray], styles: Mapping[str, dict], label: str, caption: str
) -> str:
    """Weights of several groups as one histogram; a sentence where all are equal."""
    groups = {name: values[np.isfinite(values)] for name, values in groups.items()}
    groups = {name: values for name, values in groups.items() if len(values)}
    if not groups:
        return ""
    everything = np.concatenate([*groups.values()])
    low, high = everything.min(), everything.max()
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        return notes([f"{label}: all weights are {high:.6g}."])
    figure, axes = axes_of()
    edges = np.histogram_bin_edges(everything, bins=30)
    for name, values in groups.items():
        shares = 100 * np.histogram(values, edges)[0] / len(values)
        axes.stairs(shares, edges, alpha=0.15, fill=True, color=styles[name]["color"])
        axes.stairs(shares, edges, label=name, linewidth=1.5, **styles[name])
    axes.set(xlabel="weight", ylabel="instances, %")
    return svg_figure(figure, label, caption)


def figure_distribution(runs: Sequence[Run]) -> str:
    """Final weights of all runs as one histogram."""
    styles = line_styles(run.name for run in runs)
    return figure_histogram(
        {plot_label(run.name): run.weights for run in runs},
        {plot_label(name): style for name, style in styles.items()},
        "Weights at the end",
        "Distribution of all weights at the end.",
    )


def table_datasets(run: Run, shards: ShardFolder) -> str:
    """Mean weight of each data set, where records name theirs."""
    names = np.empty(shards.num_rows, dtype=object)
    for shard in range(shards.num_shards):
        names[shard :: shards.num_shards] = shards.read_column(shard, "dataset")
    groups = pd.Series(run.weights).groupby(names)
    if set(groups.groups) == {""}:
        return ""
    rows = [
        (str(name) or "(no name)", f"{len(w):,}", significant(float(w.mean())),
         significant(float(w.median())), decimal(effective_sample_size(w.to_numpy()), 0))
        for name, w in groups
    ]  # fmt: skip
    head = ("Data set", "Instances", "Mean", "Median", "Effective")
    return html_table(f"Weights by data set, {label_of(run.name).lower()}", head, rows)


def instances(run: Run, shards: ShardFolder, truth: Sequence[str] = ()) -> str:
    """The instances with the highest and the lowest weights: images, steps and labels.

    Args:
        truth: for each instance a remark, where something is known about it.
    """
    order = np.argsort(-run.weights, kind="stable")
    order = order[np.isfinite(run.weights[order])]
    if not len(order) or run.weights[order[0]] == run.weights[order[-1]]:
        return ""
    count = min(INSTANCES, len(order) // 2)
    ends = {"Most raised": order[:count], "Most lowered": order[: -count - 1 : -1]}
    blocks = [
        wrap("stack", "".join(_instance(title, run, shards, int(i), truth) for i in ids))
        for title, ids in ends.items()
    ]
    return "".join(blocks)


def _instance(title: str, run: Run, shards: ShardFolder, i: int, truth: Sequence[str]) -> str:
    row = shards.read(i % shards.num_shards, i // shards.num_shards)
    images = "".join(map(thumbnail, row["images"]))
    question, steps = question_and_steps(row["conversations"])
    items = "".join(
        f"<li>{escape(shortened(text, STEP_TEXT))} <b>{LABELS[label]}</b></li>"
        for text, label in steps
    )
    name = escape(shortened(row["source_id"] or str(i), QUESTION_TEXT))
    remark = f"<p><b>{escape(truth[i])}</b></p>" if truth else ""
    return (
        f'<article class="instance"><div class="images">{images}</div><div>'
        f"<h3>{title}: weight {significant(run.weights[i])}, instance {name}</h3>"
        f"<p>{escape(shortened(question, QUESTION_TEXT))}</p><ol>{items}</ol>{remark}</div>"
        "</article>"
    )


def question_and_steps(turns: Sequence[Turn]) -> tuple[str, list[tuple[str, str | None]]]:
    """The question of a conversation, and each step's text with its label.

    The first step may stand in the question's own turn, as in VisualPRM's data.
    """
    asked: list[str] = []
    texts: list[str] = []
    steps: list[tuple[str, str | None]] = []
    for turn in turns:
        if turn["from"] == "human":
            texts.append(turn["value"])
        elif turn["from"] == "gpt":
            if not steps:
                *asked, text = texts
                prompt, mark, first = text.partition(SOLUTION_MARK)
                if mark:
                    asked.append(prompt)
                texts = [first if mark else text]
            steps.append((" ".join(texts).strip(), turn["value"]))
            texts = []
    question = " ".join(asked).strip().removeprefix(QUESTION_PREFIX.strip())
    return question.strip(), steps


def training_shards(run: Run) -> ShardFolder:
    """The shards that a run was trained on.

    Raises:
        InputError: they are not where they were, or do not fit the run's weights.
    """
    named = run.config.get("train_json_file", "(no train_json_file in config.yaml)")
    path = shards_at(Path(str(named)), "training")
    if not (path / MANIFEST).is_file():
        raise InputError(f"its training shards are not at {path}")
    shards = ShardFolder(path)
    if shards.num_rows != len(run.weights):
        raise InputError(
            f"{path} holds {shards.num_rows:,} instances for {len(run.weights):,} weights"
        )
    return shards
