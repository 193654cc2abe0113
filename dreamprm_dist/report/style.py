"""Names, colours and numbers of a report."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

# Colours are Okabe and Ito's, which colour-blind readers can tell apart, as far as they show on
# white and on black; grey is for what no trained PRM did.
GREY, BLUE, VERMILION, GREEN = "#8a8f98", "#0072B2", "#D55E00", "#009E73"
ORANGE, SKY, PURPLE = "#E69F00", "#56B4E9", "#CC79A7"


class Method(NamedTuple):
    """A row of tables and plots.

    Attributes:
        label: its name.
        explanation: what it is, in a sentence.
        color: in plots; all weights 1 are warm, learned ones cold.
        meta: whether its PRM has trained on the meta set; empty without a PRM.
    """

    label: str
    explanation: str = ""
    color: str = GREY
    meta: str = ""


NO, WEIGHTS, YES = "no", "through its weights", "yes"
# In the order of tables and plots: rows that may be compared stand together.
METHODS = {
    "first": Method("First candidate", "No choice at all: the first candidate of each question."),
    "random": Method("Random candidate", "A candidate drawn at random."),
    "self_consistency": Method(
        "Self-consistency", "The most frequent answer among the candidates; needs no PRM."
    ),
    "cold_start": Method(
        "Cold start",
        "The PRM fine-tuned on the noisy labels; the PRMs below go on from it.",
        PURPLE,
        NO,
    ),
    "baseline": Method(
        "Baseline", "Trained on with the noisy labels, every instance at weight 1.", VERMILION, NO
    ),
    "instance_table": Method(
        "Instance table",
        "Trained on as long, with a weight for every instance that is learned from the meta set.",
        SKY,
        WEIGHTS,
    ),
    "instance_net": Method(
        "Instance net",
        "The same, but a small network tells an instance's weight from its loss.",
        GREEN,
        WEIGHTS,
    ),
    "domain_table": Method(
        "Domain table",
        "The same, but with one learned weight for each data set.",
        GREEN,
        WEIGHTS,
    ),
    "shuffled_meta": Method(
        "Shuffled meta",
        "Control: the instance table with a meta set whose answers were shuffled and say nothing.",
        GREY,
        WEIGHTS,
    ),
    "meta_only": Method(
        "Meta set alone",
        "Trained on with the meta set alone, without the noisy labels.",
        PURPLE,
        YES,
    ),
    "baseline_plus_meta": Method(
        "Baseline + meta",
        "The baseline with the meta set mixed into its training data, all at weight 1.",
        ORANGE,
        YES,
    ),
    "table_plus_meta": Method(
        "Table + meta",
        "The instance table with the meta set mixed in too: it teaches the weights and the PRM.",
        BLUE,
        YES,
    ),
    "net_plus_meta": Method(
        "Net + meta", "The instance net with the meta set mixed in too.", GREEN, YES
    ),
    "bis_plus_meta": Method(
        "BIS + meta",
        "Baseline + meta on the part of the training data with the highest Balanced-Information "
        "Scores (arXiv:2602.04145).",
        VERMILION,
        YES,
    ),
    "mc_agreement_plus_meta": Method(
        "MC agreement + meta",
        "Baseline + meta on the part whose Monte Carlo roll-outs agree most.",
        VERMILION,
        YES,
    ),
    "small_loss_plus_meta": Method(
        "Small loss + meta",
        "Baseline + meta on the part on which the cold start's loss is smallest.",
        VERMILION,
        YES,
    ),
    "random_plus_meta": Method(
        "Random part + meta",
        "Baseline + meta on a part drawn at random: what having fewer data does by itself.",
        VERMILION,
        YES,
    ),
    "other_cold_start": Method(
        "Other cold start",
        "A model from another initialization, fine-tuned on the same noisy labels.",
        PURPLE,
        NO,
    ),
    "other_baseline": Method(
        "Other baseline", "Baseline + meta of that other model: all at weight 1.", ORANGE, YES
    ),
    "other_fixed": Method(
        "Other, given weights",
        "The same with the weights that table + meta learned for the first model; none are "
        "learned here.",
        BLUE,
        YES,
    ),
    "oracle": Method("Oracle", "Right whenever a candidate is: no choice can do better."),
    "small_loss": Method("Small loss", "Ranked by the cold start's loss, without the meta set."),
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


def method_of(name: str) -> Method:
    """A method; an unknown one has its name as label and is grey."""
    return METHODS.get(name) or Method(shortened(name.replace("_", " ").capitalize(), 60))


def line_styles(names: Iterable[str]) -> dict[str, dict]:
    """Colour and dashes of a curve for each run: told apart also without colours."""
    palette, dashes = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY), ("-", "--", "-.", ":")
    styles = {}
    for i, name in enumerate(names):
        color = METHODS[name].color if name in METHODS else palette[i % len(palette)]
        styles[name] = {"color": color, "linestyle": dashes[i % len(dashes)]}
    return styles


def label_of(name: str) -> str:
    """Label of a method."""
    return method_of(name).label


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


def points(value: object) -> str:
    """A difference of fractions in percentage points, with a sign, or a dash."""
    points = 100 * number(value)
    return f"{points:+.1f}".replace("-", "−") if math.isfinite(points) else "–"


def span(bounds: Sequence[object], shown: Callable[[object], str]) -> str:
    """An interval: both bounds, of which `shown` makes text."""
    return " to ".join(map(shown, bounds))


def listed(texts: Sequence[str]) -> str:
    """Texts as a sentence lists them: "a, b and c"."""
    return " and ".join(part for part in (", ".join(texts[:-1]), *texts[-1:]) if part)
