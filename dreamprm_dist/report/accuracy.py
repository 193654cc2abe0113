"""Accuracies of PRMs with intervals, from an evaluation's `results.json`."""

from collections.abc import Iterable, Mapping, Sequence

from dreamprm_dist.evaluation.results import Results, StepMetrics, TableRow
from dreamprm_dist.prm.aggregation import AGGREGATIONS
from dreamprm_dist.report.html import axes_of, html_table, svg_figure
from dreamprm_dist.report.style import (
    GREY,
    decimal,
    label_of,
    line_styles,
    percent,
    plot_label,
    points,
    span,
)


def table_accuracy(results: Results) -> str:
    """Each method, a PRM with the aggregation that stands for it, and its gain over the first."""
    rows = [
        (
            (label_of(row.prm or row.method), row.aggregation),
            (percent(row.accuracy), span(row.interval_95, percent).replace("%", "")),
            (points(row.over_first), span(row.over_first_interval_95, points)),
        )
        for row in _standing(results)
    ]
    caption = (
        f"Questions with a right pick, of {results.num_questions:,}; percentage points over the "
        "first candidate; below both their paired 95% intervals"
    )
    return html_table(caption, ("Picked by", "Right", "Over first"), rows)


def table_aggregations(results: Results) -> str:
    """Right picks of each PRM by aggregation: the one that stands for it is marked."""
    on_test = {label: results.accuracies(label) for label in results.prms}
    chosen = "the best on the meta set" if results.meta_accuracy else "given to launch/evaluate.py"
    tables = {
        f"Right picks by aggregation. ★ stands for its PRM on the rest of this page: {chosen}.": (
            on_test
        ),
        f"The same on the meta set, {results.chosen_on}": results.meta_accuracy,
    }
    return "".join(
        html_table(
            caption,
            ("PRM", *AGGREGATIONS),
            [
                (
                    label_of(label),
                    *(
                        ("★ " if results.prms[label].aggregation == name else "")
                        + percent(accuracies[label].get(name))
                        for name in AGGREGATIONS
                    ),
                )
                for label in accuracies
            ],
        )
        for caption, accuracies in tables.items()
    )


def table_between(results: Results) -> str:
    """PRMs against each other."""
    rows = [
        (
            f"{label_of(row.prm)} − {label_of(row.over)}",
            (points(row.difference), span(row.interval_95, points)),
        )
        for row in results.between
    ]
    caption = "PRMs against each other, percentage points, with 95% intervals"
    return html_table(caption, ("Difference", "Mean"), rows)


def table_subjects(results: Results) -> str:
    """Accuracy by subject, each PRM with the aggregation that stands for it."""
    methods = ["first", "random", "self_consistency", *results.prms, "oracle"]
    rows = [
        (subject, f"{row['num_questions']:,}", *(percent(row[method]) for method in methods))
        for subject, row in results.by_subject.items()
    ]
    return html_table("By subject", ("Subject", "Questions", *map(plot_label, methods)), rows)


def table_steps(by_prm: Mapping[str, StepMetrics | None]) -> str:
    """Quality of each PRM's step scores, where steps have labels."""
    rows = [
        (label_of(label), f"{steps.num_steps:,}", decimal(steps.auroc, 3),
         decimal(steps.brier, 3), decimal(steps.calibration_error, 3))
        for label, steps in by_prm.items() if steps
    ]  # fmt: skip
    head = ("PRM", "Steps", "AUROC", "Brier score", "Calibration error")
    return html_table("Single steps against their labels", head, rows)


def figure_intervals(results: Results) -> str:
    """Accuracies with their intervals, each PRM with the aggregation that stands for it."""
    styles = line_styles(results.prms)
    return figure_points(
        (
            plot_label(row.prm or row.method),
            styles[row.prm]["color"] if row.prm else GREY,
            row.accuracy,
            row.interval_95,
        )
        for row in _standing(results)
    )


def figure_points(rows: Iterable[tuple[str, str, float, Sequence[float]]]) -> str:
    """Accuracies as points on the lines of their intervals.

    Args:
        rows: label, colour, accuracy, and low and high or nothing.
    """
    rows = [*rows]
    figure, axes = axes_of(0.8 + 0.28 * len(rows))
    for place, (_, color, accuracy, interval) in enumerate(rows):
        bounds = [100 * value for value in interval]
        axes.plot(bounds, [place] * len(bounds), color=color, linewidth=2)
        axes.plot(100 * accuracy, place, "o", color=color)
    axes.set_yticks(range(len(rows)), [label for label, *_ in rows])
    axes.set(xlabel="right picks, %")
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    return svg_figure(figure, "Right picks with 95% intervals", "Points: right picks; lines: 95%.")


def figure_by_n(results: Results) -> str:
    """Accuracy against the number of candidates."""
    numbers = [int(n) for n in results.by_n]
    if len(numbers) < 2:
        return ""
    figure, axes = axes_of()
    for name, style in line_styles(results.prms).items():
        values = [100 * row[name] for row in results.by_n.values()]
        axes.plot(numbers, values, marker="o", markersize=3, label=plot_label(name), **style)
    for name, dashes in (("oracle", "-"), ("self_consistency", "--"), ("random", ":")):
        values = [100 * row[name] for row in results.by_n.values()]
        axes.plot(numbers, values, color=GREY, linestyle=dashes, label=label_of(name))
    axes.set(xlabel="candidates N, drawn at random", ylabel="right picks, %", xticks=numbers)
    return svg_figure(figure, "Right picks against N", "Expected right picks against N.")


def _standing(results: Results) -> list[TableRow]:
    """The methods, each PRM once."""
    return [
        row for row in results.table
        if not row.prm or results.prms[row.prm].aggregation == row.aggregation
    ]  # fmt: skip
