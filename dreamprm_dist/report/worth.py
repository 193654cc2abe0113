"""Whether learned weights are worth it: what may be compared in a demo, and what it says."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from dreamprm_dist.report.accuracy import figure_points
from dreamprm_dist.report.html import Cell, html_table
from dreamprm_dist.report.style import (
    METHODS,
    decimal,
    label_of,
    method_of,
    number,
    ordered,
    percent,
    plot_label,
    points,
    span,
)

# Both of a pair have used the meta set alike but for the weights; the first pair is the main one.
PAIRS = (("table_plus_meta", "baseline_plus_meta"), ("instance_table", "baseline"))
FREE = (
    *(
        "meta_only",
        "bis_plus_meta",
        "mc_agreement_plus_meta",
        "small_loss_plus_meta",
        "random_plus_meta",
    ),
)
# What else picks without learned weights. The baselines are of the pairs.
UNTRAINED = ("self_consistency", "cold_start")
WEIGHTS = ("the weights help", "the weights do harm")
ONE_SEED = (
    "All this is of one seed: its intervals say what other questions would change, and nothing of "
    "what another training would give; make demo-seeds trains several."
)


@dataclass(frozen=True)
class Comparison:
    """The numbers of a `summary.json`, as far as they are there.

    Attributes:
        accuracy: share of the questions with a right pick, by method.
        intervals: low and high of it.
        differences: mean, low and high by (a, b): accuracy of a minus that of b.
        auc, lowest_auc: noise AUC, over several seeds their mean and lowest, by what was ranked.
        seeds: summaries of each seed; none of a single one.
        sizes: of the meta sets, in solutions, ascending; the last is the whole set.
        kept: share of the training solutions that a free baseline kept.
    """

    accuracy: dict[str, float]
    intervals: dict[str, tuple[float, ...]]
    differences: dict[tuple[str, str], tuple[float, ...]]
    auc: dict[str, float]
    lowest_auc: dict[str, float]
    seeds: list[dict]
    sizes: list[int]
    kept: dict[str, float]

    @classmethod
    def read(cls, summary: dict) -> Comparison:
        """Of a summary's content."""
        differences = {}
        for name, value in summary.get("differences", {}).items():
            a, _, b = name.partition("_minus_")
            differences[a, b] = tuple(number(value.get(key)) for key in ("mean", "low", "high"))
        return cls(
            {name: number(value) for name, value in summary.get("accuracy", {}).items()},
            {n: tuple(map(number, bounds)) for n, bounds in summary.get("intervals", {}).items()},
            differences,
            summary.get("noise_auc", {}),
            summary.get("noise_auc_lowest", {}),
            summary.get("seeds", []),
            sorted(summary.get("meta_sizes", [])),
            summary.get("kept", {}),
        )

    def difference(self, a: str, b: str) -> tuple[float, ...]:
        """Accuracy of a minus that of b, low and high; the first alone where no more is known.

        Empty where one of them has no accuracy.
        """
        if (a, b) in self.differences:
            values = self.differences[a, b]
        else:
            values = (self.accuracy.get(a, math.nan) - self.accuracy.get(b, math.nan),)
        return values if all(map(math.isfinite, values)) else ()

    def known(self, names: Iterable[str]) -> list[str]:
        """Those with an accuracy that is a number."""
        return [name for name in names if math.isfinite(self.accuracy.get(name, math.nan))]

    def best_free(self) -> str:
        """What picks most often without learned weights, the pairs' baselines aside; or ""."""
        free = self.known((*FREE, *UNTRAINED))
        return max(free, key=lambda name: self.accuracy[name], default="")

    def best_table(self) -> str:
        """The instance table with the most training; or ""."""
        return next(iter(self.known(table for table, _ in PAIRS)), "")

    def gain(self, a: str, b: str) -> str:
        """`difference` in words: "2.0 percentage points more (95% interval …, over 5 seeds)"."""
        mean, *interval = self.difference(a, b)
        text = f"{100 * abs(mean):.1f} percentage points {'more' if mean >= 0 else 'fewer'}"
        scope = f"over {len(self.seeds)} seeds" if len(self.seeds) > 1 else "one seed only"
        return f"{text} ({f'95% interval {span(interval, points)}, ' if interval else ''}{scope})"


def is_sized(name: str) -> bool:
    """Whether a method's meta set was a smaller one: its name ends in a size."""
    return re.sub(r"-\d+$", "", name) in METHODS and name not in METHODS


def verdict(comparison: Comparison) -> list[str]:
    """The page's first paragraphs: the pairs, the best free alternative, and what weights found."""
    beginnings = {
        PAIRS[0]: "Both trained on the meta set too",
        PAIRS[1]: "Neither trained on the meta set, from which the table's weights were learned",
    }
    paragraphs = [
        f"{beginning}: with learned instance weights ({label_of(a).lower()}) the PRM picks a right "
        f"solution for {percent(comparison.accuracy[a])} of the questions, without them "
        f"({label_of(b).lower()}) for {percent(comparison.accuracy[b])}: {comparison.gain(a, b)}. "
        + conclusion(comparison.difference(a, b), *WEIGHTS)
        for (a, b), beginning in beginnings.items()
        if len(comparison.known((a, b))) == 2 and comparison.difference(a, b)
    ]
    paragraphs += [_free(comparison), _found(comparison)]
    said = [text.strip() for text in paragraphs if text]
    if said and len(comparison.seeds) < 2:
        said.append(ONE_SEED)
    return said or ["This folder holds no accuracies to compare."]


def conclusion(difference: tuple[float, ...], above: str, below: str) -> str:
    """What an interval shows, in a sentence; nothing without one.

    Args:
        above, below: what an interval above 0 shows, and one below.
    """
    if len(difference) < 3:
        return ""
    _, low, high = difference
    if low > 0:
        return f"The interval lies above 0: in this demo {above}."
    if high < 0:
        return f"The interval lies below 0: in this demo {below}."
    return f"The interval includes 0: it is not shown that {above}."


def _free(comparison: Comparison) -> str:
    table, free = comparison.best_table(), comparison.best_free()
    if not (table and free and (difference := comparison.difference(table, free))):
        return ""
    text = (
        f"The strongest free alternative is {method_of(free).label}, right for "
        f"{percent(comparison.accuracy[free])}: {label_of(table).lower()} picks right "
        f"{comparison.gain(table, free)}. "
    )
    if difference[0] < 0:
        text += "What costs nothing picks right more often here. "
    return text + conclusion(
        difference, "the weights do better than it", "it does better than the weights"
    )


def _found(comparison: Comparison) -> str:
    table = next((table for table, _ in PAIRS if table in comparison.auc), "")
    if not math.isfinite(found := number(comparison.auc.get(table))):
        return ""
    lowest = decimal(comparison.lowest_auc.get(table))
    least = "" if lowest == "–" else f", {lowest} in the lowest seed"
    text = (
        f"A clean training instance outweighs one with flipped labels in {found:.0%} of all pairs "
        f"(noise AUC {found:.2f}, {label_of(table).lower()}{least}; 0.50 is chance)"
    )
    if math.isfinite(by_loss := number(comparison.auc.get("small_loss"))):
        text += f"; the cold start's loss, which is free, tells them apart in {by_loss:.0%}"
        text += ", better than the weights" if by_loss > found else ""
    return text + "."


def tiles(comparison: Comparison) -> dict[str, str]:
    """The key figures by what they are."""
    figures = {}
    for a, b in PAIRS:
        if len(comparison.known((a, b))) == 2:
            for name in (a, b):
                figures[f"right picks, {label_of(name).lower()}"] = percent(
                    comparison.accuracy[name]
                )
            figures |= _tile(comparison, a, b)
    table, free = comparison.best_table(), comparison.best_free()
    ranked = next((table for table, _ in PAIRS if table in comparison.auc), "")
    return figures | {
        **_tile(comparison, table, free),
        "noise AUC of the weights": decimal(comparison.auc.get(ranked)),
        "seeds": decimal(len(comparison.seeds) or None, 0),
    }


def _tile(comparison: Comparison, a: str, b: str) -> dict[str, str]:
    mean, *interval = comparison.difference(a, b) or (math.nan,)
    name = f"percentage points, {label_of(a).lower()} over {label_of(b)}"
    return {name + (f" (95%: {span(interval, points)})" if interval else ""): points(mean)}


def method_cell(name: str) -> Cell:
    """A method's label, with the sentence that says what it is."""
    return method_of(name).label, method_of(name).explanation


def table_methods(comparison: Comparison) -> str:
    """Every method, the fair pairs beside each other."""
    rows = [
        (
            method_cell(name),
            method_of(name).meta or "–",
            percent(comparison.accuracy[name]),
            interval_of(comparison, name) or "–",
        )
        for name in ordered(comparison.accuracy)
        if not is_sized(name)
    ]
    return html_table(
        "Questions with a right pick. Rows that used the meta set alike may be compared",
        ("Picked by", "Trained on the meta set", "Right", "95% interval"),
        rows,
    )


def interval_of(comparison: Comparison, name: str) -> str:
    """An accuracy's interval in percent, without the sign; empty without one."""
    return span(comparison.intervals.get(name, ()), percent).replace("%", "")


def figure_methods(comparison: Comparison) -> str:
    """Every method's accuracy on its interval."""
    shown = [name for name in comparison.known(ordered(comparison.accuracy)) if not is_sized(name)]
    if not shown:
        return ""
    return figure_points(
        (
            plot_label(name),
            method_of(name).color,
            comparison.accuracy[name],
            comparison.intervals.get(name, ()),
        )
        for name in shown
    )


def table_differences(comparison: Comparison) -> str:
    """All differences that were measured, those of smaller meta sets aside."""
    rows = [
        (f"{label_of(a)} − {label_of(b)}" if b else label_of(a), *map(points, values))
        for (a, b), values in comparison.differences.items()
        if not is_sized(a)
    ]
    caption = "Differences between right picks in percentage points, with 95% intervals"
    return html_table(caption, ("Difference", "Mean", "Low", "High"), rows)


def with_interval(values: tuple[float, ...]) -> Cell:
    """A difference in percentage points, and below it its interval."""
    mean, *interval = values or (math.nan,)
    return points(mean), span(interval, points)
