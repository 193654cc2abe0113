"""Names, colours and numbers of a report."""

import math
from collections.abc import Iterable
from typing import Any

# Colours are Okabe and Ito's, which colour-blind readers can tell apart, as far as they show on
# white and on black; grey is for what no trained PRM did.
GREY, BLUE, VERMILION, GREEN = "#8a8f98", "#0072B2", "#D55E00", "#009E73"
ORANGE, SKY, PURPLE = "#E69F00", "#56B4E9", "#CC79A7"
# Label, explanation and colour, in the order of tables and plots.
METHODS = {
    "first": ("First candidate", "no choice at all", GREY),
    "random": ("Random candidate", "drawn at random", GREY),
    "self_consistency": ("Self-consistency", "the most frequent answer", GREY),
    "cold_start": ("Cold start", "PRM fine-tuned on the noisy labels", SKY),
    "baseline": ("Baseline", "trained on, all instances weighing the same", VERMILION),
    "baseline_plus_meta": ("Baseline + meta", "the same, the meta set mixed in", PURPLE),
    "instance_table": ("Instance table", "trained on, a learned weight per instance", BLUE),
    "instance_net": ("Instance net", "trained on, a small network gives the weights", GREEN),
    "domain_table": ("Domain table", "trained on, a learned weight per data set", ORANGE),
    "small_loss": ("Small loss", "ranked by the cold start's loss, without meta data", GREY),
    "shuffled_meta": ("Shuffled meta", "control: the meta set's answers shuffled", GREY),
    "oracle": ("Oracle", "right whenever a candidate is", GREY),
}
# Text stays text, so that the page's CSS gives it a font and a colour for light and dark.
PLOT_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), GREY),
    "figure.constrained_layout.use": True,
}


def ordered(names: Iterable[str]) -> list[str]:
    """Known methods in their order, the others after them."""
    known = list(METHODS)
    return sorted(names, key=lambda n: (known.index(n) if n in METHODS else len(known), n))


def method_of(name: str) -> tuple[str, str, str]:
    """Label, explanation and colour of a method; an unknown one is grey."""
    return METHODS.get(name) or (shortened(name.replace("_", " ").capitalize(), 60), "", GREY)


def line_styles(names: Iterable[str]) -> dict[str, dict]:
    """Colour and dashes of a curve for each run: told apart also without colours."""
    palette, dashes = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY), ("-", "--", "-.", ":")
    styles = {}
    for i, name in enumerate(names):
        color = METHODS[name][2] if name in METHODS else palette[i % len(palette)]
        styles[name] = {"color": color, "linestyle": dashes[i % len(dashes)]}
    return styles


def label_of(name: str) -> str:
    """Label of a method."""
    return method_of(name)[0]


def plot_label(name: str) -> str:
    """Label of a method in a plot, where a long one would leave no room for the data."""
    return shortened(label_of(name), 24)


def shortened(text: str, most: int) -> str:
    """A text of at most this many characters: of a longer one the beginning and the end."""
    half = (most - 3) // 2
    return text if len(text) <= most else f"{text[:half]} … {text[-half:]}"


def number(value: object) -> float:
    """A number; NaN for anything else."""
    return float(value) if isinstance(value, int | float) else math.nan


def decimal(value: object, digits: int = 2) -> str:
    """A number for reading, or a dash."""
    return f"{number(value):,.{digits}f}" if math.isfinite(number(value)) else "–"


def significant(value: float) -> str:
    """A score or a weight, or a dash: small ones, and those close to 1, keep what tells them apart.

    Three decimals, and up to six where the number or its distance to 1 has its first two digits
    there; below that an exponent. `serving/page.html` has the same rule.
    """
    if not math.isfinite(value):
        return "–"
    gap = min(abs(value), abs(1 - value))
    places = max(3, 1 - math.floor(math.log10(gap))) if gap else 0
    if places > 6 and abs(value) < 0.5:
        return f"{value:.1e}".replace("e-0", "e-")
    return f"{value:.{min(places, 6)}f}"


def percent(value: object) -> str:
    """A fraction as a percentage, or a dash."""
    return f"{number(value):.1%}" if math.isfinite(number(value)) else "–"


def points(value: object, over: float = 0.0) -> str:
    """Percentage points over something, with a sign, or a dash."""
    points = 100 * (number(value) - over)
    return f"{points:+.1f}".replace("-", "−") if math.isfinite(points) else "–"
