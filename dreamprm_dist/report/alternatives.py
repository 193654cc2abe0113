"""What a demo of several seeds compares beside the pairs: meta sets, free data choices, a model."""

import math

from dreamprm_dist.report.html import axes_of, html_table, notes, svg_figure
from dreamprm_dist.report.style import (
    VERMILION,
    label_of,
    listed,
    method_of,
    percent,
)
from dreamprm_dist.report.worth import (
    FREE,
    PAIRS,
    WEIGHTS,
    Comparison,
    conclusion,
    interval_of,
    method_cell,
    with_interval,
)

TABLE, BASELINE = PAIRS[0]
BY_SIZE = (BASELINE, "meta_only", "instance_table", TABLE)
FREE_LIMITS = (
    "The counts of this demo's roll-outs are simulated from the labels: where labels are flipped, "
    "so are the counts. BIS and MC agreement can find no flipped instance here, which is a limit "
    "of the demo and not of them.",
    "The strongest of several is in part the luckiest, which favours it a little.",
)


def _at(comparison: Comparison, name: str, size: int) -> str:
    """The method with a meta set of this size; the whole set has the plain name."""
    return name if size == comparison.sizes[-1] else f"{name}-{size}"


def meta_sizes(comparison: Comparison) -> list[str]:
    """Right picks against the size of the meta set: a sentence, a plot and a table."""
    sizes = [
        size
        for size in comparison.sizes
        if comparison.known(_at(comparison, name, size) for name in BY_SIZE)
    ]
    if len(sizes) < 2:
        return []
    return [
        notes([when_worth_it(comparison)]),
        _figure_sizes(comparison, sizes),
        _table_sizes(comparison, sizes),
    ]


def when_worth_it(comparison: Comparison) -> str:
    """At which sizes of the meta set the table beats the baseline, both trained on it."""
    above: list[str] = []
    within: list[str] = []
    below: list[str] = []
    for size in comparison.sizes:
        a, b = (_at(comparison, name, size) for name in (TABLE, BASELINE))
        difference = comparison.difference(a, b)
        if len(difference) == 3:
            _, low, high = difference
            (above if low > 0 else below if high < 0 else within).append(str(size))
    if not above + within + below:
        return "No differences with intervals by size of the meta set."
    if not above:
        said = ["At no size of the meta set does table + meta beat baseline + meta"]
    else:
        said = [
            f"With {listed(above)} solutions in the meta set table + meta picks right more often "
            "than baseline + meta, the interval above 0"
        ]
    if within:
        said.append(f"with {listed(within)} the interval includes 0, so no gain is shown")
    if below:
        said.append(f"with {listed(below)} it lies below 0, so the weights do harm there")
    return (
        "; ".join(said) + ". Both need the same clean meta set: the weights' own price is the time "
        "that the meta gradient and the hypergradient take."
    )


def _figure_sizes(comparison: Comparison, sizes: list[int]) -> str:
    figure, axes = axes_of(3.4)
    axes.set_xscale("log")
    for shift, name in zip((0.95, 0.98, 1.01, 1.04), BY_SIZE, strict=True):
        rows = [(size, _at(comparison, name, size)) for size in sizes]
        rows = [(size, row) for size, row in rows if comparison.known([row])]
        if not rows:
            continue
        # Side by side, so that no interval hides another.
        places = [size * shift for size, _ in rows]
        values = [100 * comparison.accuracy[row] for _, row in rows]
        color = method_of(name).color
        axes.plot(places, values, "o-", color=color, markersize=4, label=label_of(name))
        for place, (_, row) in zip(places, rows, strict=True):
            bounds = [100 * value for value in comparison.intervals.get(row, ())]
            axes.plot([place] * len(bounds), bounds, color=color, linewidth=1.5)
    if comparison.known(["baseline"]):
        axes.axhline(
            100 * comparison.accuracy["baseline"],
            color=VERMILION,
            linestyle="--",
            label="Baseline, no meta set",
        )
    axes.set_xticks(sizes, map(str, sizes))
    axes.minorticks_off()
    axes.set(xlabel="solutions in the meta set", ylabel="right picks, %")
    label = "Right picks against the size of the meta set"
    return svg_figure(figure, label, f"{label}; upright lines: 95% intervals.")


def _table_sizes(comparison: Comparison, sizes: list[int]) -> str:
    rows = []
    for size in sizes:
        names = [_at(comparison, name, size) for name in BY_SIZE]
        baseline, meta_only, alone, table = names
        rows.append(
            (
                f"{size:,}",
                *((percent(comparison.accuracy.get(n)), interval_of(comparison, n)) for n in names),
                with_interval(comparison.difference(table, baseline)),
                with_interval(comparison.difference(table, meta_only)),
                with_interval(comparison.difference(alone, "baseline")),
            )
        )
    head = ("Meta solutions", *map(label_of, BY_SIZE))
    gains = ("Table + meta − baseline + meta", "− meta set alone", "Instance table − baseline")
    caption = "By size of the meta set: right picks, and differences in points; below 95% intervals"
    table = html_table(caption, head + gains, rows)
    return f'<div class="wide">{table}</div>'


def free_baselines(comparison: Comparison) -> list[str]:
    """What costs nothing, against both of the main pair."""
    if not (free := comparison.known(FREE)):
        return []
    rows = [
        (
            method_cell(name),
            percent(comparison.kept.get(name.removesuffix("_plus_meta"))),
            (percent(comparison.accuracy[name]), interval_of(comparison, name)),
            with_interval(comparison.difference(name, BASELINE)),
            with_interval(comparison.difference(TABLE, name)),
        )
        for name in free
    ]
    better = [name for name in free if comparison.accuracy[name] > _accuracy(comparison, TABLE)]
    said = (
        f"{listed([label_of(name) for name in better])} picked right more often than table + meta."
    )
    head = ("Data", "Kept", "Right", "Over baseline + meta", "Table + meta over it")
    caption = "Free choices of training data, trained as baseline + meta is; below 95% intervals"
    return [
        notes(([said] if better else []) + [*FREE_LIMITS]),
        f'<div class="wide">{html_table(caption, head, rows)}</div>',
    ]


def _accuracy(comparison: Comparison, name: str) -> float:
    return comparison.accuracy.get(name, math.nan)


def other_model(comparison: Comparison) -> list[str]:
    """Whether the weights serve a model that has not learned them."""
    given, plain = "other_fixed", "other_baseline"
    if not (rows := comparison.known(("other_cold_start", plain, given))):
        return []
    said = []
    if difference := comparison.difference(given, plain):
        said.append(
            f"With the weights that the first model learned, another model picks right for "
            f"{percent(comparison.accuracy[given])} of the questions, with all weights 1 for "
            f"{percent(comparison.accuracy[plain])}: {comparison.gain(given, plain)}. "
            + conclusion(difference, *WEIGHTS)
        )
    cells = [
        (method_cell(n), percent(comparison.accuracy[n]), interval_of(comparison, n)) for n in rows
    ]
    caption = "Right picks of another model"
    return [notes(said), html_table(caption, ("Picked by", "Right", "95% interval"), cells)]
