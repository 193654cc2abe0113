"""A demo's page answers whether it is worth it: as plainly where the answer does not please."""

import json
import re
from html import unescape
from pathlib import Path

import pytest
from test_report import Outline, write_run, write_summary

from dreamprm_dist.report.demo import MAIN, write_demo_report
from dreamprm_dist.report.style import METHODS, listed
from dreamprm_dist.report.worth import Comparison, is_sized

MAIN_PAIR = "table_plus_meta_minus_baseline_plus_meta"
ACCURACY = {
    "first": 0.25,
    "self_consistency": 0.16,
    "oracle": 0.7,
    "cold_start": 0.52,
    "baseline": 0.5,
    "instance_table": 0.62,
    "baseline_plus_meta": 0.6,
    "table_plus_meta": 0.64,
}
FREE = {
    "meta_only": 0.57,
    "bis_plus_meta": 0.55,
    "small_loss_plus_meta": 0.61,
    "random_plus_meta": 0.57,
}
OTHER = {"other_cold_start": 0.51, "other_baseline": 0.58, "other_fixed": 0.6}
SIZES = (48, 96, 192, 480)


def differences(accuracy: dict[str, float], half: float, *pairs: str) -> dict[str, dict]:
    """Of each pair, with an interval of this half width."""
    found = {}
    for pair in pairs:
        a, b = pair.split("_minus_")
        mean = accuracy[a] - accuracy[b]
        found[pair] = {"mean": mean, "low": mean - half, "high": mean + half}
    return found


def read(folder: Path) -> tuple[list[str], str, list[list[str]]]:
    """Paragraphs of the verdict, the page's text, and rows of its tables."""
    page = write_demo_report(folder).read_text()
    outline = Outline(page)
    assert outline.open == []
    paragraphs = re.findall('<p class="verdict">(.*?)</p>', page)
    return [unescape(text) for text in paragraphs], unescape(page), outline.rows


@pytest.fixture
def several(tmp_path: Path) -> Path:
    """A summary of two seeds with everything that the page compares."""
    accuracy = ACCURACY | FREE | OTHER
    for place, size in enumerate(SIZES[:3]):
        for name, value in (("baseline", 0.54), ("instance", 0.56), ("table", 0.53)):
            full = "instance_table" if name == "instance" else f"{name}_plus_meta"
            accuracy[f"meta_only-{size}"] = 0.51
            accuracy[f"{full}-{size}"] = value + (0.03 if name == "table" else 0.01) * place
    pairs = [MAIN_PAIR, "instance_table_minus_baseline", "other_fixed_minus_other_baseline"]
    pairs += [f"table_plus_meta_minus_{name}" for name in FREE]
    pairs += [f"{name}_minus_baseline_plus_meta" for name in FREE]
    pairs += [f"table_plus_meta-{n}_minus_baseline_plus_meta-{n}" for n in SIZES[:3]]
    auc = {"table_plus_meta": 0.9, "instance_table-48": 0.6, "small_loss": 0.8}
    write_summary(
        tmp_path,
        seeds=[{"seed": s, "accuracy": accuracy, "noise_auc": auc} for s in (1, 2)],
        accuracy=accuracy,
        intervals={name: [value - 0.02, value + 0.02] for name, value in accuracy.items()},
        differences=differences(accuracy, 0.015, *pairs),
        noise_auc=auc,
        noise_auc_lowest={"table_plus_meta": 0.87, "small_loss": 0.79},
        meta_sizes=list(SIZES),
        kept={"bis": 0.5, "small_loss": 0.5, "random": 0.5},
    )
    return tmp_path


def change(folder: Path, **values: object) -> None:
    """Other values in a summary; None removes one."""
    summary = json.loads((folder / "summary.json").read_text()) | values
    write_summary(folder, **{key: value for key, value in summary.items() if value is not None})


def test_the_verdict_names_the_fair_pairs_the_best_free_choice_and_the_noise(several: Path):
    verdict, page, rows = read(several)
    assert verdict == [
        "Both trained on the meta set too: with learned instance weights (table + meta) the PRM "
        "picks a right solution for 64.0% of the questions, without them (baseline + meta) for "
        "60.0%: 4.0 percentage points more (95% interval +2.5 to +5.5, over 2 seeds). The interval "
        "lies above 0: in this demo the weights help.",
        "Neither trained on the meta set, from which the table's weights were learned: with "
        "learned instance weights (instance table) the PRM picks a right solution for 62.0% of the "
        "questions, without them (baseline) for 50.0%: 12.0 percentage points more (95% interval "
        "+10.5 to +13.5, over 2 seeds). The interval lies above 0: in this demo the weights help.",
        "The strongest free alternative is Small loss + meta, right for 61.0%: table + meta picks "
        "right 3.0 percentage points more (95% interval +1.5 to +4.5, over 2 seeds). The interval "
        "lies above 0: in this demo the weights do better than it.",
        "A clean training instance outweighs one with flipped labels in 90% of all pairs (noise "
        "AUC 0.90, table + meta, 0.87 in the lowest seed; 0.50 is chance); the cold start's loss, "
        "which is free, tells them apart in 80%.",
    ]
    tiles = dict(re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", page))
    assert tiles["right picks, table + meta"] == "64.0%"
    assert tiles["percentage points, table + meta over Baseline + meta (95%: +2.5 to +5.5)"] == (
        "+4.0"
    )
    assert tiles["seeds"] == "2" and tiles["noise AUC of the weights"] == "0.90"
    assert ["Table + meta", "yes", "64.0%", "62.0 to 66.0"] in rows
    assert ["Instance table", "through its weights", "62.0%", "60.0 to 64.0"] in rows
    assert ["Table + meta − Baseline + meta", "+4.0", "+2.5", "+5.5"] in rows
    # A cold start is free too, and is the best free choice where nothing else is.
    change(several, accuracy=ACCURACY)
    assert "The strongest free alternative is Cold start, right for 52.0%" in read(several)[0][2]


@pytest.mark.parametrize(
    ("table", "half", "said"),
    [
        (0.61, 0.02, "1.0 percentage points more (95% interval −1.0 to +3.0, over 2 seeds). The "
         "interval includes 0: it is not shown that the weights help."),
        (0.59, 0.02, "1.0 percentage points fewer (95% interval −3.0 to +1.0, over 2 seeds). The "
         "interval includes 0: it is not shown that the weights help."),
        (0.55, 0.02, "5.0 percentage points fewer (95% interval −7.0 to −3.0, over 2 seeds). The "
         "interval lies below 0: in this demo the weights do harm."),
    ],
)  # fmt: skip
def test_a_main_pair_that_does_not_please_is_said(
    several: Path, table: float, half: float, said: str
):
    accuracy = ACCURACY | {"table_plus_meta": table}
    change(several, accuracy=accuracy, differences=differences(accuracy, half, MAIN_PAIR))
    assert read(several)[0][0].endswith(said)


@pytest.mark.parametrize(
    ("half", "said"),
    [
        (0.02, "The interval lies below 0: in this demo it does better than the weights."),
        (0.05, "The interval includes 0: it is not shown that the weights do better than it."),
    ],
)
def test_a_free_choice_that_wins_is_said(several: Path, half: float, said: str):
    accuracy = ACCURACY | FREE | {"bis_plus_meta": 0.68}
    pair = "table_plus_meta_minus_bis_plus_meta"
    change(several, accuracy=accuracy, differences=differences(accuracy, half, pair))
    verdict, page, rows = read(several)
    bounds = {0.02: "−6.0 to −2.0", 0.05: "−9.0 to +1.0"}[half]
    assert (
        "The strongest free alternative is BIS + meta, right for 68.0%: table + meta picks right "
        f"4.0 percentage points fewer (95% interval {bounds}, over 2 seeds). What costs nothing "
        f"picks right more often here. {said}"
    ) in verdict
    assert "<li>BIS + meta picked right more often than table + meta.</li>" in page
    assert ["BIS + meta", "50.0%", "68.0%", "+8.0", "−4.0"] in rows
    assert "simulated from the labels" in page


def test_a_loss_that_finds_the_noise_better_is_said(several: Path):
    change(several, noise_auc={"table_plus_meta": 0.8, "small_loss": 0.85}, noise_auc_lowest=None)
    said = "which is free, tells them apart in 85%, better than the weights."
    assert read(several)[0][-1].endswith(said)


def test_one_seed_says_what_its_interval_is_not_about(tmp_path: Path):
    write_summary(tmp_path, seed=1, accuracy=ACCURACY)
    verdict, _, _ = read(tmp_path)
    assert "4.0 percentage points more (one seed only)." in verdict[0]
    assert verdict[-1].startswith("All this is of one seed: its intervals say")
    assert "The interval" not in " ".join(verdict)
    write_summary(tmp_path, accuracy=ACCURACY, differences=differences(ACCURACY, 0.02, MAIN_PAIR))
    verdict, _, _ = read(tmp_path)
    assert "4.0 percentage points more (95% interval +2.0 to +6.0, one seed only)." in verdict[0]
    write_summary(tmp_path, accuracy=ACCURACY, seeds=[{"seed": 1, "accuracy": ACCURACY}])
    assert "(one seed only)" in read(tmp_path)[0][0] and read(tmp_path)[0][-1] == verdict[-1]
    # A folder without the main pair has the other one.
    accuracy = {"instance_table": 0.4, "baseline": 0.5}
    write_summary(tmp_path, accuracy=accuracy)
    verdict, page, _ = read(tmp_path)
    assert "without them (baseline) for 50.0%: 10.0 percentage points fewer" in verdict[0]
    for heading in ("What the size", "Free baselines", "The weights with another"):
        assert heading not in page


def test_the_sizes_at_which_the_table_wins(several: Path):
    _, page, rows = read(several)
    # By size: -1, +1, +3 and (the whole set) +4 points, each with 1.5 on both sides.
    assert (
        "<li>With 192 and 480 solutions in the meta set table + meta picks right more often than "
        "baseline + meta, the interval above 0; with 48 and 96 the interval includes 0, so no gain "
        "is shown."
    ) in page
    assert ["48", "54.0%", "51.0%", "56.0%", "53.0%", "−1.0", "+2.0", "+6.0"] in rows
    assert ["480", "60.0%", "57.0%", "62.0%", "64.0%", "+4.0", "+7.0", "+12.0"] in rows
    figure = page[page.index('aria-label="Right picks against the size of the meta set"') :]
    assert figure.index("Baseline, no meta set") < figure.index("</svg>")
    summary = json.loads((several / "summary.json").read_text())
    for pair in summary["differences"].values():
        pair |= {"low": -0.03, "high": -0.01}
    change(several, differences=summary["differences"])
    said = "At no size of the meta set does table + meta beat baseline + meta; with 48, 96, 192 and"
    assert f"<li>{said} 480 it lies below 0, so the weights do harm there." in read(several)[1]
    # One size is no curve.
    change(several, meta_sizes=[480])
    assert "What the size of the meta set changes" not in read(several)[1]


def test_rows_of_smaller_meta_sets_stand_with_the_sizes_alone(several: Path):
    _, page, rows = read(several)
    assert not [row for row in rows if "-48" in row[0]] and "48" in [row[0] for row in rows]
    assert is_sized("table_plus_meta-48") and not is_sized("other_fixed") and not is_sized("x-48")
    assert ["Other, given weights", "60.0%", "58.0 to 62.0"] in rows
    said = "another model picks right for 60.0% of the questions, with all weights 1 for 58.0%: 2.0"
    assert said in page
    assert ["Small loss", "0.80", "0.79"] in rows


@pytest.mark.parametrize("part", ["accuracy", "intervals", "differences", "noise_auc",
                                  "noise_auc_lowest", "meta_sizes", "kept", "seeds"])  # fmt: skip
def test_what_a_summary_lacks_is_left_out(several: Path, part: str):
    change(several, **{part: None})
    assert read(several)[0]
    change(several, **{part: {} if part not in ("seeds", "meta_sizes") else []})
    assert read(several)[0]


def test_numbers_that_are_none_are_dashes(several: Path):
    nothing = {"mean": None, "low": None, "high": None}
    accuracy = dict.fromkeys(ACCURACY, None)
    change(several, accuracy=accuracy, differences={MAIN_PAIR: nothing}, noise_auc={"oracle": None})
    verdict, _, rows = read(several)
    assert verdict == ["This folder holds no accuracies to compare."]
    assert ["Table + meta − Baseline + meta", "–", "–", "–"] in rows


def test_every_row_says_what_it_is():
    for name, method in METHODS.items():
        assert method.explanation.endswith("."), name
    labels = [method.label for method in METHODS.values()]
    assert len({*labels}) == len(labels)


def test_pairs_that_may_be_compared_stand_together():
    order = [*METHODS]
    for a, b in (("baseline", "instance_table"), ("baseline_plus_meta", "table_plus_meta"),
                 ("other_baseline", "other_fixed")):  # fmt: skip
        assert order.index(b) == order.index(a) + 1


def test_a_difference_without_an_interval_is_that_of_the_accuracies():
    comparison = Comparison.read({"accuracy": {"a": 0.5, "b": 0.25}})
    assert comparison.difference("a", "b") == (0.25,)
    assert comparison.difference("a", "c") == ()


def test_of_many_runs_the_main_ones_are_drawn(several: Path):
    for name in (*MAIN, "net_plus_meta", "table_plus_meta-48"):
        write_run(several / "seed-1" / name)
    page = read(several)[1]
    losses = page[page.index('aria-label="Lower loss over iterations"') :].partition("</svg>")[0]
    assert "Table + meta" in losses and "Net + meta" not in losses
    assert "launch/report.py makes a page about any of the 2 others." in page
    assert page.count("<summary>") == len(MAIN)


def test_lists_in_sentences():
    assert [listed(["a", "b", "c"][:n]) for n in range(4)] == ["", "a", "a and b", "a, b and c"]
