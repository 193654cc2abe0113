"""The page about benchmarks of labelled steps: metrics with intervals, and calibration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

from dreamprm_dist.errors import InputError
from dreamprm_dist.evaluation.benchmarks import BENCHMARKS
from dreamprm_dist.evaluation.benchmarks.results import (
    BenchmarkResults,
    Judged,
    Value,
    read_results,
)
from dreamprm_dist.files import refuse_overwriting
from dreamprm_dist.report.accuracy import table_steps
from dreamprm_dist.report.html import Cell, axes_of, html_table, notes, svg_figure, whole_page, wrap
from dreamprm_dist.report.style import (
    GREY,
    PLOT_STYLE,
    decimal,
    label_of,
    line_styles,
    percent,
    plot_label,
    points,
    shortened,
    significant,
    span,
)

ORACLE = "oracle thresholds"
ORACLE_SENTENCE = (
    "The threshold of each PRM is the one that is best on these very solutions. That is no "
    "measurement of a PRM: it is here to be put beside numbers that were published so."
)


@matplotlib.rc_context(PLOT_STYLE)
def write_benchmark_report(folders: Sequence[Path], out: Path) -> Path:
    """Write one page about benchmarks; returns its path.

    Args:
        folders: folders that `launch/benchmark.py` wrote.
        out: the page to write.

    Raises:
        InputError: a folder is named twice, or its `results.json` is not what it should be.
    """
    paths = [folder / "results.json" for folder in folders]
    refuse_overwriting([out], paths)
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError("a benchmark's folder is named twice; name each once")
    found = [read_results(path) for path in paths]
    times = Counter(results.benchmark for results in found)
    sections: dict[str, list[str]] = {}
    verdicts = []
    for folder, results in zip(folders, found, strict=True):
        title = BENCHMARKS[results.benchmark].title
        if times[results.benchmark] > 1:
            title += f", {folder}"
        sections |= _sections(title, results)
        verdicts.append(_verdict(title, results))
    name = " and ".join(folder.resolve().name for folder in folders)
    page = whole_page(name, "Benchmarks of labelled steps", " ".join(verdicts), sections)
    out.write_text(page, encoding="utf-8")
    return out


def _sections(title: str, results: BenchmarkResults) -> dict[str, list[str]]:
    steps = {label: prm.steps for label, prm in results.prms.items()}
    sections = {
        title: [
            notes(_left_out(results)),
            wrap("wide", "".join(_table(results, label, "judged") for label in results.prms)),
            _figure_intervals(results),
            _figure_calibration(results),
            wrap("wide", _table_between(results)),
            table_steps(steps),
            _table_groups(results),
        ]
    }
    if any(prm.oracle for prm in results.prms.values()):
        sections[f"{title}, {ORACLE}"] = [
            notes([ORACLE_SENTENCE]),
            wrap("wide", "".join(_table(results, label, "oracle") for label in results.prms)),
        ]
    return sections


def _left_out(results: BenchmarkResults) -> list[str]:
    counts = {
        f"{results.num_rejected:,} records were rejected.": results.num_rejected,
        f"{results.num_unscored:,} solutions could not be scored by at least one PRM, and are left "
        "out for all.": results.num_unscored,
        f"{results.num_stray_marks:,} marks are of no step, and count for nothing.": (
            results.num_stray_marks
        ),
    }
    return [sentence for sentence, count in counts.items() if count]


def _cell(value: Value, show: Callable[[object], str] = percent) -> Cell:
    if value.value is None or value.interval_95 is None:
        return "–"
    return show(value.value), span(value.interval_95, show).replace("%", "")


def _table(results: BenchmarkResults, label: str, which: str) -> str:
    """A PRM's rows, every metric with its interval."""
    benchmark, prm = BENCHMARKS[results.benchmark], results.prms[label]
    judged: Judged | None = getattr(prm, which)
    if judged is None:
        return ""
    how = "the best on these very solutions" if which == "oracle" else "as given"
    if which == "judged" and prm.chosen:
        how = (
            f"chosen on {results.threshold_chosen_on}, macro-F1 there "
            f"{percent(prm.chosen.macro_f1)} over {prm.chosen.num_solutions:,} solutions"
        )
        if prm.chosen.num_unscored:
            how += f" ({prm.chosen.num_unscored:,} could not be scored)"
    rows: list[list[Cell]] = [
        [
            row.name,
            f"{results.groups[row.name].num_solutions:,}" if row.name in results.groups else "",
            *map(_cell, row.metrics.values()),
        ]
        for row in judged.rows
    ]
    caption = (
        f"{label_of(label)}, threshold {significant(judged.threshold)}, {how}; "
        "below each number its 95% interval"
    )
    head = (benchmark.groups.capitalize(), "Solutions", *benchmark.metrics.values())
    return html_table(caption, head, rows)


def _table_between(results: BenchmarkResults) -> str:
    """PRMs against each other, a row of the benchmark's table in each row."""
    headline = BENCHMARKS[results.benchmark].headline
    if not results.between:
        return ""
    head = [f"{label_of(pair.prm)} − {label_of(pair.over)}" for pair in results.between]
    rows: list[list[Cell]] = [
        [row.name, *(_cell(pair.rows[i].metrics[headline], points) for pair in results.between)]
        for i, row in enumerate(results.between[0].rows)
    ]
    caption = (
        f"{BENCHMARKS[results.benchmark].metrics[headline]} of PRMs against each other, percentage "
        "points, with paired 95% intervals"
    )
    return html_table(caption, (BENCHMARKS[results.benchmark].groups.capitalize(), *head), rows)


def _table_groups(results: BenchmarkResults) -> str:
    rows = [
        (
            name,
            *(
                f"{number:,}"
                for number in (
                    size.num_solutions,
                    size.num_right,
                    size.num_wrong,
                    size.num_unlabelled,
                )
            ),
        )
        for name, size in results.groups.items()
    ]
    group = BENCHMARKS[results.benchmark].groups.capitalize()
    head = (group, "Solutions", "Right steps", "Wrong steps", "Without a label")
    return html_table("What was scored", head, rows)


def _figure_intervals(results: BenchmarkResults) -> str:
    """The headline metric of each row with its interval, by PRM."""
    benchmark = BENCHMARKS[results.benchmark]
    names = [row.name for row in next(iter(results.prms.values())).judged.rows]
    styles = line_styles(results.prms)
    each = 0.8 / len(styles)
    figure, axes = axes_of(0.9 + 0.2 * len(names) * (1 + len(styles) / 2))
    for i, (label, prm) in enumerate(results.prms.items()):
        values = [row.metrics[benchmark.headline] for row in prm.judged.rows]
        color = styles[label]["color"]
        there = [
            (place + (i - (len(styles) - 1) / 2) * each, value.value, value.interval_95)
            for place, value in enumerate(values)
            if value.value is not None and value.interval_95
        ]
        for place, _, interval in there:
            axes.plot([100 * bound for bound in interval], [place, place], color=color, linewidth=2)
        axes.plot(
            [100 * value for _, value, _ in there],
            [place for place, _, _ in there],
            "o",
            color=color,
            label=plot_label(label),
        )
    axes.set_yticks(range(len(names)), [shortened(name, 28) for name in names])
    heading = benchmark.metrics[benchmark.headline]
    axes.set(xlabel=f"{heading}, %")
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    caption = f"Points: {heading}; lines: 95%."
    return svg_figure(figure, f"{benchmark.title}: {heading} with 95% intervals", caption)


def _figure_calibration(results: BenchmarkResults) -> str:
    """The share of right steps against the score, in bins."""
    figure, axes = axes_of(3.4)
    axes.plot([0, 1], [0, 1], color=GREY, linestyle=":", label="as scored")
    for label, style in line_styles(results.prms).items():
        bins = results.prms[label].steps.bins
        scores, right = ([part[name] for part in bins] for name in ("score", "right"))
        axes.plot(scores, right, marker="o", markersize=3, label=plot_label(label), **style)
    axes.set(xlabel="score, mean of a bin", ylabel="right steps", xlim=(0, 1), ylim=(0, 1))
    return svg_figure(
        figure,
        f"{BENCHMARKS[results.benchmark].title}: calibration of single steps",
        "Share of right steps against their score, in ten equal bins.",
    )


def _verdict(title: str, results: BenchmarkResults) -> str:
    benchmark = BENCHMARKS[results.benchmark]
    shares = ", ".join(
        f"{label_of(label)} {percent(prm.judged.rows[0].metrics[benchmark.headline].value)} "
        f"(AUROC {decimal(prm.steps.auroc, 3)})"
        for label, prm in results.prms.items()
    )
    heading = benchmark.metrics[benchmark.headline]
    return f"{title}, {heading} over {results.num_solutions:,} solutions: {shares}."
