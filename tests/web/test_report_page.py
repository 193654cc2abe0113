"""The report in headless Chromium: no console errors, no violations, no sideways scroll."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from browser import NEEDS_BROWSER, framed, probed, visit

from data_tools.shard import shard_file
from dreamprm_dist.evaluation.best_of_n import CandidateScores
from dreamprm_dist.evaluation.compare import compare
from dreamprm_dist.evaluation.results import write_results
from dreamprm_dist.report.overview import write_run_report

pytestmark = NEEDS_BROWSER


SETS = ("CLEVR_math_en_20240402_extracted_prefix_pair_sampling", "g" * 300, "a b " * 99, "字" * 99)


@pytest.fixture(scope="module")
def page(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of two runs with everything that a report can hold."""
    return report(tmp_path_factory.mktemp("report"), tiny_shards)


@pytest.fixture(scope="module")
def long_page(tiny_data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, with names and texts of data that are long, in one piece or in many."""
    root = tmp_path_factory.mktemp("long")
    records = json.loads((tiny_data_dir / "train.json").read_text())
    for i, record in enumerate(records):
        record |= {"dataset": SETS[i % 4], "id": SETS[i % 4] * 9}
        for turn in record["conversations"]:
            turn["value"] = turn["value"] if turn["from"] == "gpt" else SETS[i % 4] * 30
    (root / "long.json").write_text(json.dumps(records))
    train = root / "train"
    shard_file(root / "long.json", train, "training", 4, progress=False, image_root=tiny_data_dir)
    return report(root, root)


def report(root: Path, shards: Path) -> Path:
    """Write a report of two runs on these shards."""
    for name in ("baseline", "instance_table"):
        run = root / name
        run.mkdir()
        rows = [
            {"iteration": i, "lower_loss": 1 / i, "weighted_loss": 1 / i, "meta_loss": 1 / i}
            | {"lr": 1e-4, "meta_lr": 0.1, "samples_per_second": 5.0, "seconds_lower": 1.0}
            | {f"weight_q{q:02d}": q / 50 for q in (5, 25, 50, 75, 95)}
            for i in range(1, 30)
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = {"train_json_file": str(shards / "train")}
        (run / "config.yaml").write_text(yaml.safe_dump(config))
    (root / "instance_table" / "export").mkdir()
    table = pd.DataFrame({"sample_id": range(64), "weight": np.linspace(0, 2, 64)})
    table.to_parquet(root / "instance_table" / "export" / "instance_weights.parquet")
    by_prm = {"baseline": "mean", "instance_table": "min"}
    generator = np.random.default_rng(0)
    prms = {
        label: [
            CandidateScores(
                q, str(q), c, "art", [float(generator.random())], "A", c == q % 3, [], ["+"]
            )
            for q in range(20)
            for c in range(3)
        ]
        for label in by_prm
    }
    write_results(root / "results.json", compare(prms, by_prm))
    folders = [root / name for name in by_prm]
    return write_run_report(folders, root / "report.html", root / "results.json")


def look(page: Path, width: int, *flags: str) -> dict:
    """Findings of axe-core and the browser about the page at this width in pixels."""
    (page.parent / f"probed-{width}.html").write_text(probed(page.read_text()))
    frame = page.with_name(f"frame-{width}.html")
    frame.write_text(framed(f"probed-{width}.html", width))
    return visit(frame.as_uri(), page.parent, *flags)


@pytest.mark.parametrize("flags", [(), ("--blink-settings=preferredColorScheme=0",)])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_accessible_and_fits(page: Path, width: int, flags: tuple[str, ...]) -> None:
    found = look(page, width, *flags)
    assert found["violations"] == [] and found["checks"] > 15
    assert found["console"] == []
    assert found["overflow"] == 0
    assert found["dark"] == bool(flags)


@pytest.mark.parametrize("width", [1280, 390])
def test_tables_are_in_sight_or_show_that_they_scroll(
    page: Path, long_page: Path, width: int
) -> None:
    for shown in (page, long_page):
        found = look(shown, width)
        assert found["violations"] == [] and found["overflow"] == 0
        assert "Weights by data set" in found["text"]
        # A shadow that stays, under a cover that goes with the table's end.
        assert all(cue == "local, scroll" for _, cue in found["scrolled"])
        assert bool(found["scrolled"]) == (width == 390)
        names = " ".join(name for name, _ in found["scrolled"])
        assert "right pick" not in names and "against each other" not in names


def test_the_probe_finds_what_is_wrong(page: Path) -> None:
    broken = page.with_name("broken.html")
    text = page.read_text().replace('alt="the question\'s image"', "")
    broken.write_text(text.replace("<main", '<p style="width:3000px">wide</p><main'))
    found = look(broken, 390)
    assert "image-alt" in [name for name, _ in found["violations"]]
    assert found["overflow"] > 0
