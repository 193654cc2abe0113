"""One page about a demo run: which solutions were picked, what the weights found, where time went.

    python launch/report.py runs/demo

reads what `launch/demo.py` left in the folder and writes `report.html` beside it. The page loads
nothing, and the same folder gives the same bytes. What a folder does not hold is left out.
"""

import argparse
import io
import json
import math
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

import matplotlib
import numpy as np
import pandas as pd
import yaml
from matplotlib.figure import Figure

# Colours are Okabe and Ito's, which colour-blind readers can tell apart, as far as they show on
# white and on black; grey is for what no trained PRM did.
GREY, BLUE, VERMILION, GREEN = "#8a8f98", "#0072B2", "#D55E00", "#009E73"
ORANGE, SKY, PURPLE = "#E69F00", "#56B4E9", "#CC79A7"
# Label, explanation and colour, in the order of tables and plots.
METHODS = {
    "first": ("First candidate", "no choice at all", GREY),
    "random": ("Random candidate", "drawn by lot", GREY),
    "self_consistency": ("Self-consistency", "the most frequent answer", GREY),
    "cold_start": ("Cold start", "PRM fine-tuned on the noisy labels", SKY),
    "baseline": ("Baseline", "trained on, all instances weighing the same", VERMILION),
    "baseline_plus_meta": ("Baseline + meta", "the same, the meta set mixed in", PURPLE),
    "instance_table": ("Instance table", "trained on, a learned weight an instance", BLUE),
    "instance_net": ("Instance net", "trained on, a small network gives the weights", GREEN),
    "small_loss": ("Small loss", "ranked by the cold start's loss, without meta data", GREY),
    "shuffled_meta": ("Shuffled meta", "control: the meta set's answers shuffled", ORANGE),
    "oracle": ("Oracle", "right whenever a candidate is", GREY),
}
LOSSES = {"lower_loss": "Lower loss", "weighted_loss": "Weighted loss", "meta_loss": "Meta loss"}
PHASES = {"data": ORANGE, "lower": BLUE, "meta": GREEN}
PHASES |= {"hypergradient": VERMILION, "upper": PURPLE}
BANDS = [f"weight_q{q}" for q in ("05", "25", "50", "75", "95")]
MOST_POINTS = 400  # of a curve; more would only make the page heavy
# Text stays text, so that the page's CSS gives it a font and a colour for light and dark.
PLOT_STYLE = {"svg.fonttype": "none", "text.parse_math": False, "font.size": 9}
PLOT_STYLE |= {"axes.grid": True, "axes.axisbelow": True, "grid.alpha": 0.25}
PLOT_STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
PLOT_STYLE |= dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), GREY)
PLOT_STYLE |= {"figure.constrained_layout.use": True}
PAGE = Template(Path(__file__).with_name("report_page.html").read_text(encoding="utf-8"))


@dataclass
class Run:
    """A run folder, as far as it is there: `metrics` may be empty, `weights` are by sample ID."""

    name: str
    metrics: pd.DataFrame
    config: dict
    weights: np.ndarray | None

    @classmethod
    def read(cls, folder: Path) -> "Run":
        path = folder / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        # A killed run may leave half a line; a resumed one writes some iterations again.
        rows = {r["iteration"]: r for r in (json.loads(x) for x in lines if x.endswith("}"))}
        config, weights = folder / "config.yaml", folder / "export" / "instance_weights.parquet"
        return cls(
            folder.name,
            pd.DataFrame(rows.values()),
            (yaml.safe_load(config.read_text(encoding="utf-8")) if config.exists() else None) or {},
            pd.read_parquet(weights).sort_values("sample_id")["weight"].to_numpy()
            if weights.exists()
            else None,
        )

    def curve(self, *columns: str) -> pd.DataFrame:
        """`iteration` and `columns`; of a long run the means of neighbouring rows."""
        rows = self.metrics[["iteration", *columns]].dropna()
        return rows.groupby(np.arange(len(rows)) // math.ceil(len(rows) / MOST_POINTS)).mean()

    def seconds(self, phase: str) -> float:
        """Mean of an iteration; a row holds those of all iterations since the row before."""
        column = f"seconds_{phase}"
        measured = column in self.metrics
        return self.metrics[column].sum() / self.metrics["iteration"].max() if measured else 0.0


@matplotlib.rc_context(PLOT_STYLE)
def write_report(folder: Path) -> Path:
    """Write `report.html` into a folder that `launch/demo.py` made; returns its path.

    Raises:
        ValueError: there is no `summary.json`, or a file is not what it should be.
    """
    summary = _read_json(folder / "summary.json")
    if not isinstance(summary, dict):
        raise ValueError(f"{folder} has no summary.json; name a folder that launch/demo.py made")
    found = {p.parent.name for n in ("metrics.jsonl", "config.yaml") for p in folder.glob(f"*/{n}")}
    runs = [Run.read(folder / name) for name in _ordered(found)]
    truth = _read_json(folder / "data" / "truth.json")
    flipped = np.array([bool(t["flipped"]) for t in truth or []])
    accuracy, auc = summary.get("accuracy", {}), summary.get("noise_auc", {})
    differences, seeds = _differences(summary), summary.get("seeds", [])
    # Other lengths mean that records were rejected, and sample IDs are not those of the truth.
    weighted = [r for r in runs if r.weights is not None and len(r.weights) == len(flipped)]
    sections = {
        "Key figures": [_tiles(summary, differences, flipped)],
        "Which solution is picked": [
            table_accuracy(accuracy),
            _wrap("stack", figure_accuracy(accuracy) + table_differences(differences)),
        ],
        "Seeds": [_wrap("wide", table_seeds(seeds))],
        "Clean and flipped instances": [
            *(figure_weights(run, flipped) for run in weighted),
            table_noise_auc(auc),
        ],
        "Losses and weights over iterations": [
            *(figure_loss(runs, loss) for loss in LOSSES),
            *(figure_quantiles(run) for run in runs if {*BANDS} <= {*run.metrics}),
        ],
        "Where time goes": [figure_seconds([r for r in runs if any(map(r.seconds, PHASES))])],
        "Settings": [_wrap("wide", "".join(map(details_settings, runs)))],
    }
    page = PAGE.substitute(
        name=escape(folder.resolve().name),
        verdict=escape(_verdict(accuracy, auc, differences, len(seeds))),
        sections="\n".join(
            f"<section><h2>{title}</h2>{_wrap('grid', ''.join(parts))}</section>"
            for title, parts in sections.items()
            if any(parts)
        ),
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _read_json(path: Path) -> dict | list | None:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def _differences(summary: dict) -> dict[str, tuple[float, ...]]:
    """(mean, low, high) by name, wherever the summary keeps them."""
    pooled = summary.get("pooled", {})
    given = pooled | pooled.get("differences", {}) | summary.get("differences", {})
    bounds = ("mean", "low", "high")
    return {
        name: tuple(_number(value[b]) for b in bounds)
        for name, value in given.items()
        if isinstance(value, dict) and value.keys() >= {*bounds}
    }


def _gain(accuracy: dict, differences: dict) -> tuple[float, ...]:
    """Instance table minus baseline, with its interval if there is one."""
    plain = _number(accuracy.get("instance_table")) - _number(accuracy.get("baseline"))
    return differences.get("instance_table_minus_baseline", (plain,))


def _verdict(accuracy: dict, auc: dict, differences: dict, seeds: int) -> str:
    gain, interval = (values := _gain(accuracy, differences))[0], values[1:]
    sentences = []
    if math.isfinite(gain) and {"instance_table", "baseline"} <= {*accuracy}:
        text = (
            f"With learned instance weights the PRM picks a right solution for "
            f"{_percent(accuracy.get('instance_table'))} of the questions, without them for "
            f"{_percent(accuracy.get('baseline'))}: {100 * abs(gain):.1f} percentage points "
            f"{'more' if gain >= 0 else 'fewer'}"
        )
        text += " (95% interval {} to {})".format(*map(_points, interval)) if interval else ""
        sentences.append(text + (f", over {seeds} seeds." if seeds else "."))
        if interval and interval[0] <= 0 <= interval[1]:
            sentences.append("The interval includes zero: this alone shows no difference.")
    if math.isfinite(found := _number(auc.get("instance_table"))):
        sentences.append(
            f"A clean training instance outweighs one with flipped labels in {found:.0%} of all "
            f"pairs (noise AUC {found:.2f}; 0.50 is chance)."
        )
    return " ".join(sentences) or "This folder holds no accuracies to compare."


def _tiles(summary: dict, differences: dict, flipped: np.ndarray) -> str:
    accuracy, auc = summary.get("accuracy", {}), summary.get("noise_auc", {})
    tiles = {
        "right picks, instance table": _percent(accuracy.get("instance_table")),
        "percentage points over the baseline": _points(_gain(accuracy, differences)[0]),
        "noise AUC of the weights": _decimal(auc.get("instance_table")),
        "test questions": _decimal(summary.get("num_questions"), 0),
        "training instances": _decimal(len(flipped) or None, 0),
        "of them with flipped labels": _percent(flipped.mean() if len(flipped) else None),
        "minutes in all": _decimal(_number(summary.get("seconds")) / 60, 1),
    }
    shown = {name: value for name, value in tiles.items() if value != "–"}
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in shown.items())
    return items and f'<dl class="tiles wide">{items}</dl>'


def table_accuracy(accuracy: dict) -> str:
    first = _number(accuracy.get("first"))
    return _table(
        "Questions with a right pick, and percentage points over the first candidate",
        ("Picked by", "Right", "Over first"),
        [(n, _percent(accuracy[n]), _points(accuracy[n], first)) for n in _ordered(accuracy)],
        by_method=True,
    )


def table_differences(differences: dict) -> str:
    rows = [
        (" − ".join(map(_label, name.split("_minus_"))), *map(_points, values))
        for name, values in differences.items()
    ]
    caption = "Differences between right picks in percentage points, with 95% intervals"
    return _table(caption, ("Difference", "Mean", "Low", "High"), rows)


def table_seeds(seeds: list[dict]) -> str:
    keys = {"accuracy": _percent, "noise_auc": _decimal}
    columns = [
        (key, name) for key in keys for name in _ordered({n for s in seeds for n in s.get(key, {})})
    ]
    rows = [
        (str(s.get("seed", "–")), *(keys[k](s.get(k, {}).get(n)) for k, n in columns))
        for s in seeds
    ]
    head = [("AUC, " if key == "noise_auc" else "") + _label(name) for key, name in columns]
    return _table("Right picks, and noise AUC of rankings, by seed", ("Seed", *head), rows)


def table_noise_auc(auc: dict) -> str:
    return _table(
        "Noise AUC: how often a clean instance ranks above a flipped one; 0.50 is chance",
        ("Ranked by", "AUC"),
        [(name, _decimal(auc[name])) for name in _ordered(auc)],
        by_method=True,
    )


def details_settings(run: Run) -> str:
    rows = [(str(key), json.dumps(value, default=str)) for key, value in run.config.items()]
    table = _table(f"config.yaml of {run.name}", ("Setting", "Value"), rows)
    return table and f"<details><summary>{escape(_label(run.name))}</summary>{table}</details>"


def figure_accuracy(accuracy: dict) -> str:
    values = {n: 100 * _number(accuracy[n]) for n in _ordered(accuracy)}
    values = {name: value for name, value in values.items() if math.isfinite(value)}
    if not values:
        return ""
    figure, axes = _axes(0.6 + 0.3 * len(values))
    labels, colors = map(_label, values), [_method(name)[2] for name in values]
    bars = axes.barh([*labels], [*values.values()], color=colors, height=0.7)
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.set(xlim=(0, 100), xlabel="right picks, %")
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    return _figure(figure, "Right picks", "No choice can be right more often than the oracle.")


def figure_weights(run: Run, flipped: np.ndarray) -> str:
    figure, axes = _axes()
    edges, medians = np.histogram_bin_edges(run.weights[np.isfinite(run.weights)], bins=30), []
    for name, group, color in (("clean", ~flipped, BLUE), ("flipped", flipped, VERMILION)):
        values = run.weights[group]
        shares = 100 * np.histogram(values, edges)[0] / max(1, len(values))
        axes.stairs(shares, edges, color=color, alpha=0.3, fill=True)
        axes.stairs(shares, edges, color=color, linewidth=1.5, label=f"{name} ({len(values)})")
        medians.append(f"{name} {np.median(values) if len(values) else math.nan:.2f}")
    axes.set(xlabel="weight", ylabel="instances of the group, %")
    label = f"Weights, {_label(run.name).lower()}"
    return _figure(figure, label, f"{label}. Medians: {', '.join(medians)}.")


def figure_loss(runs: Iterable[Run], loss: str) -> str:
    curves = {run.name: run.curve(loss) for run in runs if loss in run.metrics}
    figure, axes = _axes()
    for name, rows in curves.items():
        iteration, raw = rows["iteration"], rows[loss]
        smooth = raw.rolling(max(3, len(raw) // 15), min_periods=1, center=True).mean()
        axes.plot(iteration, raw, color=_method(name)[2], alpha=0.3, linewidth=0.7)
        axes.plot(iteration, smooth, color=_method(name)[2], label=_label(name))
    axes.set(xlabel="iteration", ylabel=LOSSES[loss].lower())
    label = f"{LOSSES[loss]} over iterations"
    return _figure(figure, label, f"{label}, smoothed; faint: as measured.") if curves else ""


def figure_quantiles(run: Run) -> str:
    figure, axes = _axes()
    rows, color = run.curve(*BANDS), _method(run.name)[2]
    iteration, q05, q25, q50, q75, q95 = (rows[name] for name in rows)
    axes.fill_between(iteration, q05, q95, color=color, alpha=0.2, linewidth=0, label="5 to 95%")
    axes.fill_between(iteration, q25, q75, color=color, alpha=0.4, linewidth=0, label="25 to 75%")
    axes.plot(iteration, q50, color=color, label="median")
    axes.set(xlabel="iteration", ylabel="weight")
    label = f"Quantiles of all weights, {_label(run.name).lower()}"
    return _figure(figure, label, f"{label}.")


def figure_seconds(runs: Sequence[Run]) -> str:
    if not runs:
        return ""
    figure, axes = _axes(1.1 + 0.35 * len(runs))
    labels, total = [_label(run.name) for run in runs], np.zeros(len(runs))
    for phase, color in PHASES.items():
        seconds = np.array([run.seconds(phase) for run in runs])
        bars = axes.barh(labels, seconds, left=total, color=color, height=0.6, label=phase)
        total += seconds
    axes.bar_label(bars, [f"{value:.2f}" for value in total], padding=3)
    axes.set(xlabel="seconds an iteration", xlim=(0, 1.15 * total.max()))
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    return _figure(figure, "Seconds an iteration by phase", "Means over a run, on rank 0.")


def _axes(height: float = 2.9) -> tuple[Figure, matplotlib.axes.Axes]:
    figure = Figure(figsize=(4.6, height))
    return figure, figure.subplots()


def _figure(figure: Figure, label: str, caption: str) -> str:
    """A plot as inline SVG: no date, no outside names, no id that another plot has."""
    if figure.axes[0].get_legend_handles_labels()[0]:
        figure.legend(loc="outside upper left", ncols=3)
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": label}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    box, drawing = re.search(
        r'<svg[^>]*(viewBox="[^"]*")[^>]*>(.*)', buffer.getvalue(), re.S
    ).groups()
    drawing = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", drawing, flags=re.S)
    drawing = re.sub(r'<g id="[^"]*"', "<g", drawing)
    return (
        f'<figure><svg {box} role="img" aria-label="{escape(label)}">{drawing.strip()}'
        f"<figcaption>{escape(caption)}</figcaption></figure>\n"
    )


def _wrap(name: str, content: str) -> str:
    return content and f'<div class="{name}">{content}</div>'


def _table(
    caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], by_method: bool = False
) -> str:
    """A table in a box that scrolls by itself; `by_method`: rows start with a method's name."""
    body = ""
    for first, *cells in rows:
        label, note, _ = _method(first) if by_method else (first, "", "")
        note = note and f"<small>{escape(note)}</small>"
        body += f'<tr><th scope="row">{escape(label)}{note}</th>'
        body += "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>\n"
    titles = "".join(f'<th scope="col">{escape(title)}</th>' for title in head)
    return body and (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}"><table>\n'
        f"<caption>{escape(caption)}</caption>\n<thead><tr>{titles}</tr></thead>\n"
        f"<tbody>\n{body}</tbody></table></div>\n"
    )


def _ordered(names: Iterable[str]) -> list[str]:
    """Known methods in their order, the others after them."""
    known = list(METHODS)
    return sorted(names, key=lambda n: (known.index(n) if n in METHODS else len(known), n))


def _method(name: str) -> tuple[str, str, str]:
    return METHODS.get(name) or (name.replace("_", " ").capitalize(), "", GREY)


def _label(name: str) -> str:
    return _method(name)[0]


def _number(value: object) -> float:
    """A number, or the mean of something pooled; NaN for anything else."""
    value = value.get("mean") if isinstance(value, dict) else value
    return float(value) if isinstance(value, int | float) else math.nan


def _decimal(value: object, digits: int = 2) -> str:
    return f"{_number(value):,.{digits}f}" if math.isfinite(_number(value)) else "–"


def _percent(value: object) -> str:
    return f"{_number(value):.1%}" if math.isfinite(_number(value)) else "–"


def _points(value: object, over: float = 0.0) -> str:
    points = 100 * (_number(value) - over)
    return f"{points:+.1f}".replace("-", "−") if math.isfinite(points) else "–"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of a demo run, such as runs/demo")
    arguments = parser.parse_args()
    try:
        print(f"report: {write_report(arguments.folder)}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
