"""The learned weights of a run: their spread, data sets, and the instances at the ends."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
import pandas as pd

from dreamprm_dist.data.images import decode_image
from dreamprm_dist.data.schema import QUESTION_PREFIX
from dreamprm_dist.data.shards import ShardFolder
from dreamprm_dist.errors import RecordError
from dreamprm_dist.report.html import axes_of, html_table, svg_figure, wrap
from dreamprm_dist.report.runs import Run
from dreamprm_dist.report.style import decimal, label_of, line_styles

INSTANCES = 4  # shown at each end
THUMBNAIL = 192  # pixels
MOST_TEXT = 300  # characters of a turn


def effective_sample_size(weights: np.ndarray) -> float:
    """(sum w)^2 / sum w^2: how many instances of equal weight would count as much (Kish, 1965)."""
    squares = np.square(weights).sum()
    return float(weights.sum() ** 2 / squares) if squares else 0.0


def figure_distribution(runs: Sequence[Run]) -> str:
    """Final weights of all runs as one histogram."""
    weights = {run.name: run.weights[np.isfinite(run.weights)] for run in runs}
    weights = {name: values for name, values in weights.items() if len(values)}
    if not weights:
        return ""
    figure, axes = axes_of()
    edges = np.histogram_bin_edges(np.concatenate([*weights.values()]), bins=30)
    for name, style in line_styles(weights).items():
        shares = 100 * np.histogram(weights[name], edges)[0] / len(weights[name])
        axes.stairs(shares, edges, label=label_of(name), linewidth=1.5, **style)
    axes.set(xlabel="weight", ylabel="instances, %")
    return svg_figure(figure, "Weights at the end", "Distribution of all weights at the end.")


def table_datasets(run: Run, shards: ShardFolder) -> str:
    """Mean weight of each data set, where records name theirs."""
    names = np.empty(shards.num_rows, dtype=object)
    for shard in range(shards.num_shards):
        names[shard :: shards.num_shards] = shards.read_column(shard, "dataset")
    groups = pd.Series(run.weights).groupby(names)
    if set(groups.groups) == {""}:
        return ""
    rows = [
        (str(name) or "(no name)", f"{len(w):,}", decimal(float(w.mean())),
         decimal(float(w.median())), decimal(effective_sample_size(w.to_numpy()), 0))
        for name, w in groups
    ]  # fmt: skip
    head = ("Data set", "Instances", "Mean", "Median", "Effective")
    return html_table(f"Weights by data set, {label_of(run.name).lower()}", head, rows)


def instances(run: Run, shards: ShardFolder) -> str:
    """The instances with the highest and the lowest weights: images, steps and labels."""
    order = np.argsort(-run.weights, kind="stable")
    ends = {"Most raised": order[:INSTANCES], "Most lowered": order[: -INSTANCES - 1 : -1]}
    blocks = [
        wrap("stack", "".join(_instance(title, run, shards, int(i)) for i in ids))
        for title, ids in ends.items()
    ]
    return "".join(blocks)


def _instance(title: str, run: Run, shards: ShardFolder, sample_id: int) -> str:
    row = shards.read(sample_id % shards.num_shards, sample_id // shards.num_shards)
    images = "".join(map(_thumbnail, row["images"]))
    turns = [turn for turn in row["conversations"] if turn["from"] != "system"]
    steps, texts = [], []
    question: list[str] = []
    for turn in turns:
        if turn["from"] == "human":
            texts.append(turn["value"])
        else:
            steps.append((texts.pop() if texts else "", turn["value"]))
            if len(steps) == 1:
                question, texts = texts, []
    items = "".join(f"<li>{_short(text)} <b>{_label(value)}</b></li>" for text, value in steps)
    name = escape(row["source_id"] or str(sample_id))
    asked = " ".join(question).removeprefix(QUESTION_PREFIX)
    return (
        f'<article class="instance"><div class="images">{images}</div>'
        f"<h3>{title}: weight {run.weights[sample_id]:.2f}, instance {name}</h3>"
        f"<p>{_short(asked)}</p><ol>{items}</ol></article>"
    )


def _label(value: str | None) -> str:
    return {"+": "labelled right (+)", "-": "labelled wrong (−)", None: "unlabelled"}[value]


def _short(text: str) -> str:
    return escape(text if len(text) <= MOST_TEXT else text[:MOST_TEXT] + " …")


def _thumbnail(data: bytes) -> str:
    try:
        image = decode_image(data)
    except RecordError:
        return "<p>(image cannot be shown)</p>"
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="the instance\'s image" src="data:image/png;base64,{encoded}">'


def training_shards(run: Run) -> ShardFolder | None:
    """The shards that a run was trained on, where they still are and fit its weights."""
    path = Path(str(run.config.get("train_json_file", "")))
    if not len(run.weights) or not (path / "manifest.json").is_file():
        return None
    shards = ShardFolder(path)
    return shards if shards.num_rows == len(run.weights) else None
