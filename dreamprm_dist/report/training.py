"""Figures and tables of training runs."""

import json
from collections.abc import Iterable
from html import escape

import numpy as np

from dreamprm_dist.report.html import axes_of, html_table, svg_figure
from dreamprm_dist.report.runs import Run
from dreamprm_dist.report.style import (
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    VERMILION,
    label_of,
    line_styles,
    method_of,
    plot_label,
)

LOSSES = {"lower_loss": "Lower loss", "weighted_loss": "Weighted loss", "meta_loss": "Meta loss"}
PHASES = {
    "data": ORANGE,
    "lower": BLUE,
    "meta": GREEN,
    "hypergradient": VERMILION,
    "upper": PURPLE,
}
BANDS = [f"weight_q{q}" for q in ("05", "25", "50", "75", "95")]


def figure_loss(runs: Iterable[Run], loss: str) -> str:
    curves = {run.name: run.curve(loss) for run in runs if run.has(loss)}
    figure, axes = axes_of()
    for name, style in line_styles(curves).items():
        iteration, raw = curves[name]["iteration"], curves[name][loss]
        smooth = raw.rolling(max(3, len(raw) // 15), min_periods=1, center=True).mean()
        axes.plot(iteration, raw, color=style["color"], alpha=0.3, linewidth=0.7)
        axes.plot(iteration, smooth, label=plot_label(name), **style)
    axes.set(xlabel="iteration", ylabel=LOSSES[loss].lower())
    label = f"{LOSSES[loss]} over iterations"
    return svg_figure(figure, label, f"{label}, smoothed; faint: as measured.") if curves else ""


def figure_curve(runs: Iterable[Run], column: str, label: str) -> str:
    """A column of the metrics over iterations, as it was measured."""
    curves = {run.name: run.curve(column) for run in runs if run.has(column)}
    figure, axes = axes_of()
    for name, style in line_styles(curves).items():
        axes.plot(curves[name]["iteration"], curves[name][column], label=plot_label(name), **style)
    axes.set(xlabel="iteration", ylabel=label.lower(), ylim=(0, None))
    return svg_figure(figure, label, f"{label} over iterations.") if curves else ""


def figure_quantiles(run: Run) -> str:
    """Quantiles of a run's weights over iterations, where they were measured."""
    if not run.has(*BANDS):
        return ""
    figure, axes = axes_of()
    rows, color = run.curve(*BANDS), method_of(run.name).color
    iteration, q05, q25, q50, q75, q95 = (rows[name] for name in rows)
    axes.fill_between(iteration, q05, q95, color=color, alpha=0.2, linewidth=0, label="5 to 95%")
    axes.fill_between(iteration, q25, q75, color=color, alpha=0.4, linewidth=0, label="25 to 75%")
    axes.plot(iteration, q50, color=color, label="median")
    axes.set(xlabel="iteration", ylabel="weight")
    label = f"Quantiles of all weights, {label_of(run.name).lower()}"
    return svg_figure(figure, label, f"{label}.")


def figure_seconds(runs: Iterable[Run]) -> str:
    """Seconds of an iteration by phase, of the runs that measured them."""
    if not (runs := [run for run in runs if any(map(run.seconds, PHASES))]):
        return ""
    figure, axes = axes_of(1.1 + 0.35 * len(runs))
    rows, total = range(len(runs)), np.zeros(len(runs))
    for phase, color in PHASES.items():
        seconds = np.array([run.seconds(phase) for run in runs])
        bars = axes.barh(rows, seconds, left=total, color=color, height=0.6, label=phase)
        total += seconds
    axes.bar_label(bars, [f"{value:.2f}" for value in total], padding=3)
    axes.set(xlabel="seconds per iteration", xlim=(0, 1.15 * total.max()))
    axes.set_yticks(rows, [plot_label(run.name) for run in runs])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    return svg_figure(figure, "Seconds per iteration by phase", "Means over a run, on rank 0.")


def details_settings(run: Run) -> str:
    rows = [(str(key), json.dumps(value, default=str)) for key, value in run.config.items()]
    table = html_table(f"config.yaml of {run.name}", ("Setting", "Value"), rows)
    return table and f"<details><summary>{escape(label_of(run.name))}</summary>{table}</details>"
