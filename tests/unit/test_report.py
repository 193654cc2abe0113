"""The report: a page that loads nothing, says what a folder holds and survives what it lacks."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from dreamprm_dist.data.shards import ShardFolder
from dreamprm_dist.evaluation.best_of_n import CandidateScores
from dreamprm_dist.evaluation.compare import compare
from dreamprm_dist.evaluation.results import read_results, write_results
from dreamprm_dist.report.demo import write_demo_report
from dreamprm_dist.report.overview import write_run_report
from dreamprm_dist.report.runs import MOST_POINTS, Run
from dreamprm_dist.report.style import shortened, significant
from dreamprm_dist.report.weights import effective_sample_size, question_and_steps, training_shards

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "report.py"
HOSTILE = 'x$1<script>alert("&")</script>'
ACCURACY = {
    "first": 0.25,
    "random": 0.262,
    "self_consistency": 0.313,
    "cold_start": 0.4,
    "baseline": 0.5,
    "baseline_plus_meta": 0.526,
    "instance_table": 0.588,
    "oracle": 0.663,
}
VOID = {"meta", "path", "use", "rect", "img"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small demo folder: a baseline, and an instance table that found the flipped instances."""
    out = tmp_path / "demo"
    (out / "data").mkdir(parents=True)
    flipped = [i % 3 == 0 for i in range(60)]
    write_json(out / "data" / "truth.json", [{"flipped": f} for f in flipped])
    write_summary(
        out,
        seed=1,
        seconds=90.0,
        num_questions=80,
        accuracy=ACCURACY,
        noise_auc={"instance_table": 0.843, "small_loss": 0.79},
    )
    write_run(out / "baseline")
    weights = np.where(flipped, 0.25, 1.5) + np.linspace(0, 0.1, 60)
    write_run(out / "instance_table", weights)
    return out


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def write_summary(folder: Path, **values: object) -> None:
    write_json(folder / "summary.json", values)


def write_run(run: Path, weights: np.ndarray | None = None) -> None:
    (run / "export").mkdir(parents=True)
    rows = []
    for iteration in range(10, 110, 10):
        row = {"iteration": iteration, "lower_loss": 5 / iteration, "weighted_loss": 4 / iteration}
        row |= {"seconds_data": 0.5, "seconds_lower": 2.0}
        if weights is not None:
            row |= {"meta_loss": 3 / iteration, "seconds_meta": 1.0, "seconds_hypergradient": 1.5}
            row |= {f"weight_q{q:02d}": q / 50 for q in (5, 25, 50, 75, 95)}
        rows.append(json.dumps(row) + "\n")
    (run / "metrics.jsonl").write_text("".join(rows))
    (run / "config.yaml").write_text(
        yaml.safe_dump({"lr": 3e-4, "image_root": None, "baseline": True})
    )
    if weights is not None:
        # The last row first: weights are matched to instances by sample ID, not by place.
        table = pd.DataFrame({"sample_id": range(len(weights)), "weight": weights})
        table[::-1].to_parquet(run / "export" / "instance_weights.parquet")


class Outline(HTMLParser):
    """Text of each table row, and whether every tag is closed."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.ids: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID or "svg" in self.open:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("th", "td"):
            self.rows[-1][-1] += data


def test_page_is_whole_and_loads_nothing(folder: Path):
    path = write_demo_report(folder)
    assert path == folder / "report.html"
    page = path.read_text()
    outline = Outline(page)
    assert outline.open == []
    assert len(outline.ids) == len(set(outline.ids))
    assert "://" not in page and "<script" not in page and "@import" not in page
    links = re.findall(r'(?:href|src)="([^"]*)"|url\(([^)]*)\)', page)
    assert links and all(target.startswith("#") for pair in links for target in pair if target)
    assert page.count("<h1") == 1 and '<html lang="en">' in page
    # Histogram, quantiles, seconds, points of accuracy, three losses.
    assert page.count('<svg viewBox="') == page.count('role="img" aria-label="') == 7
    for heading in (
        "Which solution is picked",
        "Clean and flipped instances",
        "Losses and weights over iterations",
        "Where time goes",
        "Settings",
    ):
        assert f"<h2>{heading}</h2>" in page
    assert "<h2>Seeds</h2>" not in page


def test_tables_say_what_the_summary_says(folder: Path):
    rows = Outline(write_demo_report(folder).read_text()).rows
    for row in (
        ["First candidate", "–", "25.0%", "–"],
        ["Random candidate", "–", "26.2%", "–"],
        ["Self-consistency", "–", "31.3%", "–"],
        ["Cold start", "no", "40.0%", "–"],
        ["Baseline", "no", "50.0%", "–"],
        ["Instance table", "through its weights", "58.8%", "–"],
        ["Baseline + meta", "yes", "52.6%", "–"],
        ["Oracle", "–", "66.3%", "–"],
        ["Instance table", "0.84"],
        ["Small loss", "0.79"],
        ["lr", "0.0003"],
        ["image_root", "null"],
        ["baseline", "true"],
    ):
        assert row in rows


def test_histogram_matches_weights_to_instances_by_sample_id(folder: Path):
    page = write_demo_report(folder).read_text()
    assert "Weights, instance table. Medians: clean 1.55, flipped 0.30." in page


def test_seconds_are_means_of_an_iteration(folder: Path):
    run = Run.read(folder / "instance_table")
    assert run.seconds("lower") == pytest.approx(0.2)
    assert run.seconds("upper") == 0.0
    assert ">0.50</text>" in write_demo_report(folder).read_text()


def test_metrics_of_killed_and_resumed_runs(folder: Path):
    path = folder / "baseline" / "metrics.jsonl"
    again = json.dumps({"iteration": 100, "lower_loss": 7.0, "seconds_lower": 2.0})
    path.write_text(path.read_text() + again + '\n{"iteration": 110, "lower_l')
    metrics = Run.read(folder / "baseline").metrics
    assert metrics["iteration"].tolist() == [*range(10, 110, 10)]
    assert metrics["lower_loss"].iloc[-1] == 7.0


def test_long_curves_are_thinned(folder: Path):
    rows = [json.dumps({"iteration": i, "lower_loss": float(i)}) + "\n" for i in range(1, 2001)]
    (folder / "baseline" / "metrics.jsonl").write_text("".join(rows))
    curve = Run.read(folder / "baseline").curve("lower_loss")
    assert len(curve) == MOST_POINTS == 400
    assert curve["lower_loss"].iloc[0] == 3.0  # of 1 to 5
    write_demo_report(folder)


def test_several_seeds(folder: Path):
    seeds = [
        {"seed": seed, "accuracy": ACCURACY, "noise_auc": {"instance_table": 0.8 + seed / 100}}
        for seed in (1, 2, 3)
    ]
    shutil.rmtree(folder / "instance_table")
    interval = {"mean": 0.09, "low": 0.04, "high": 0.14}
    differences = {"baseline_minus_first": interval}
    write_summary(folder, seeds=seeds, accuracy=ACCURACY, differences=differences)
    page = write_demo_report(folder).read_text()
    rows = Outline(page).rows
    assert ["Instance table", "58.8%", "58.8%", "58.8%"] in rows
    assert ["Instance table", "0.81", "0.82", "0.83"] in rows
    assert ["Baseline − First candidate", "+9.0", "+4.0", "+14.0"] in rows
    assert "8.8 percentage points more (over 3 seeds)." in page


def test_runs_of_one_name_are_told_apart(folder: Path):
    other = folder.with_name("second") / "baseline"
    shutil.copytree(folder / "baseline", other)
    page = write_run_report([folder / "baseline", other], folder / "two.html", None).read_text()
    names = [row[0] for row in Outline(page).rows if row[1:2] == ["100"]]
    assert names == ["Demo/baseline", "Second/baseline"]
    with pytest.raises(ValueError, match="named twice"):
        write_run_report([other, other], folder / "two.html", None)


def test_hostile_text_stays_text(folder: Path):
    write_summary(
        folder,
        accuracy=ACCURACY | {HOSTILE: 0.5},
        noise_auc={HOSTILE: 0.5},
        seeds=[{"seed": HOSTILE, "accuracy": {HOSTILE: 0.5}}],
        differences={HOSTILE: {"mean": 0.1, "low": 0.0, "high": 0.2}},
    )
    folder = folder.rename(folder.with_name(HOSTILE.replace("/", "∕")))
    run = (folder / "instance_table").rename(folder / HOSTILE.replace("/", "∕"))
    (run / "config.yaml").write_text(yaml.safe_dump({HOSTILE: HOSTILE}))
    page = write_demo_report(folder).read_text()
    assert "<script" not in page and '"&"' not in page
    assert page.count("&lt;script&gt;") > 10
    assert Outline(page).open == []


def test_same_folder_same_bytes(folder: Path):
    first = write_demo_report(folder).read_bytes()
    assert write_demo_report(folder).read_bytes() == first


@pytest.mark.parametrize(
    "part",
    [
        "data",
        "baseline",
        "instance_table",
        "instance_table/metrics.jsonl",
        "instance_table/config.yaml",
        "instance_table/export",
    ],
)
def test_what_is_not_there_is_left_out(folder: Path, part: str):
    path = folder / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = write_demo_report(folder).read_text()
    assert Outline(page).open == []
    missing = part in ("data", "instance_table", "instance_table/export")
    assert ("Medians: clean" in page) != missing


def test_a_summary_alone_is_enough(tmp_path: Path):
    write_summary(tmp_path)
    page = write_demo_report(tmp_path).read_text()
    assert "This folder holds no accuracies to compare." in page
    assert re.findall("<h2>(.*?)</h2>", page) == ["The task: handwritten digits"]
    assert "Questions cannot be shown: there is no" in page


def test_diverged_runs_and_rejected_records(folder: Path):
    write_json(folder / "data" / "truth.json", [{"flipped": False}] * 59)
    write_summary(folder, accuracy={"instance_table": float("nan"), "baseline": 0.5})
    page = write_demo_report(folder).read_text()
    assert ["Instance table", "through its weights", "–", "–"] in Outline(page).rows
    assert "Medians" not in page  # 59 truths cannot be matched to 60 weights
    write_json(folder / "data" / "truth.json", [{"flipped": i < 30} for i in range(60)])
    table = pd.DataFrame({"sample_id": range(60), "weight": [np.nan] * 60})
    table.to_parquet(folder / "instance_table" / "export" / "instance_weights.parquet")
    page = write_demo_report(folder).read_text()
    assert "Medians" not in page and "instance_table: 60 of 60 weights are no numbers." in page


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (np.ones(60), "all weights are 1."),
        (np.full(60, 2.5), "all weights are 2.5."),
        (np.zeros(60), "all weights are 0."),
        (1 + 1e-9 * np.arange(60), "all weights are 1."),
        (np.full(60, 1e-7), "all weights are 1e-07."),
        ([np.nan, *np.ones(59)], "all weights are 1."),
    ],
)
def test_equal_weights_are_a_sentence(folder: Path, weights: np.ndarray, said: str):
    table = pd.DataFrame({"sample_id": range(60), "weight": weights})
    table.to_parquet(folder / "instance_table" / "export" / "instance_weights.parquet")
    page = write_demo_report(folder).read_text()
    assert f"<li>Weights, instance table: {said}</li>" in page and "Medians" not in page


@pytest.mark.parametrize("middle", [1.0, 1 + 2e-5, 1e-5, 3e6, 0.0, -1.0])
def test_ticks_say_their_whole_number(folder: Path, middle: float):
    """No offset and no factor beside an axis: every number in a plot is what its tick is at."""
    weights = middle + 1e-5 * np.linspace(-1, 1, 60) * (abs(middle) if middle > 1e5 else 1)
    table = pd.DataFrame({"sample_id": range(60), "weight": weights})
    table.to_parquet(folder / "instance_table" / "export" / "instance_weights.parquet")
    path = folder / "instance_table" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    bands = {f"weight_q{q:02d}": middle + q * 1e-6 for q in (5, 25, 50, 75, 95)}
    path.write_text("".join(json.dumps(row | bands) + "\n" for row in rows))
    page = write_demo_report(folder).read_text()
    assert "Medians" in page
    figure = page[page.index('aria-label="Weights, instance table"') :].partition("</svg>")[0]
    ticks = re.findall(r"<text[^>]*>\s*([+-]?[\d.]+(?:e[+-]\d+)?)\s*</text>", figure)
    margin = 3e-6 * max(1, abs(middle))
    inside = [min(weights) - margin <= float(t) <= max(weights) + margin for t in ticks]
    assert len(ticks) > 6 and sum(inside) >= 3


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.5, "0.500"), (0.8765, "0.876"), (0.0123, "0.012"), (0.00123, "0.0012"),
        (1.23e-5, "0.000012"), (1.23e-7, "1.2e-7"), (3e-15, "3.0e-15"), (0.9996, "0.99960"),
        (0.99999, "0.999990"), (1 - 1e-9, "1.000000"), (0.0, "0"), (1.0, "1"), (2.5, "2.500"),
        (1.0004, "1.00040"), (-1.0, "-1.000"), (float("nan"), "–"), (float("inf"), "–"),
    ],
)  # fmt: skip
def test_small_numbers_keep_what_tells_them_apart(value: float, text: str):
    assert significant(value) == text


def test_long_texts_keep_both_ends():
    for length in (5, 20, 21, 500):
        text = "".join(chr(97 + i % 26) for i in range(length))
        short = shortened(text, 20)
        assert len(short) <= 20 and (short == text) == (length <= 20)
        assert short[:5] == text[:5] and short[-5:] == text[-5:]


def turns(*texts: str | None) -> list[dict]:
    return [
        {"from": "gpt" if text in ("+", "-", None) else "human", "value": text} for text in texts
    ]


@pytest.mark.parametrize(
    ("conversation", "question", "steps"),
    [
        (turns("### Question:\nQ", "one", "+", "two", "-"), "Q", ["one", "two"]),
        (turns("### Question:\nQ\n\n### Solution Process:\none", "+", "two", None), "Q",
         ["one", "two"]),
        (turns("Q\n### Solution Process: one ### Solution Process: x", "+"), "Q",
         ["one ### Solution Process: x"]),
        (turns("Q and step", "+", "two", "+"), "", ["Q and step", "two"]),
        (turns("A", "B", "one", "+", "more", "two", "-"), "A B", ["one", "more two"]),
        ([{"from": "system", "value": "S"}, *turns("Q", "one", "+")], "Q", ["one"]),
    ],
)  # fmt: skip
def test_the_judged_step_is_told_from_the_prompt(conversation, question: str, steps: list[str]):
    found, shown = question_and_steps(conversation)
    assert found == question and [text for text, _ in shown] == steps


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("metrics.jsonl", b'{"iteration": 1}\n{oops\n', "metrics.jsonl, line 2: no metrics of an"),
        ("metrics.jsonl", b'{"lower_loss": 1}\n', "line 1: no metrics of an iteration"),
        ("metrics.jsonl", b"[1]\n", "line 1: no metrics of an iteration"),
        ("metrics.jsonl", b"\xff\xfe\n", "is not UTF-8"),
        ("config.yaml", b"a: [1", "config.yaml is not YAML"),
        ("export/instance_weights.parquet", b"PAR1", "is no table of weights"),
    ],
)
def test_a_broken_file_of_a_run_is_named(folder: Path, file: str, content: bytes, said: str):
    (folder / "instance_table" / file).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(said)):
        write_run_report([folder / "instance_table"], folder / "page.html", None)


MISSING = {
    "nothing was measured": ({"metrics.jsonl": ""}, ["no metrics: no iteration was finished"]),
    "no metrics": ({"metrics.jsonl": None}, ["no metrics: no iteration was finished"]),
    "unfinished": (
        {"export": None, "config.yaml": "iteration_num: 400"},
        ["unfinished, at iteration 100 of 400: no export, no final weights"],
    ),
    "just begun": (
        {"export": None, "metrics.jsonl": None, "config.yaml": "iteration_num: 400"},
        ["no metrics", "unfinished, at iteration 0 of 400"],
    ),
    "one iteration": ({"metrics.jsonl": '{"iteration": 1, "lower_loss": 0.5}\n'}, []),
    "diverged": (
        {"metrics.jsonl": '{"iteration": 1, "lower_loss": 1}\n{"iteration": 2, "lower_loss": null,'
         ' "meta_loss": NaN}\n{"iteration": 3, "lower_loss": Infinity}\n'},
        ["lower_loss is no number in 2 of 3 rows", "meta_loss is no number in 3 of 3 rows"],
    ),
    "no numbers at all": (
        {"metrics.jsonl": '{"iteration": 1, "lower_loss": "x", "lr": null}\n'},
        ["lower_loss is no number in 1 of 1 rows"],
    ),
    "no shards": (
        {"config.yaml": "train_json_file: /nowhere"},
        ["its instances cannot be shown: its training shards are not at /nowhere"],
    ),
    "no config": ({"config.yaml": None}, ["its instances cannot be shown"]),
}  # fmt: skip


@pytest.mark.parametrize("case", MISSING)
def test_the_page_says_what_a_run_lacks(folder: Path, case: str):
    files, said = MISSING[case]
    run = folder / "instance_table"
    for name, text in files.items():
        if text is not None:
            (run / name).write_text(text)
        elif (run / name).is_dir():
            shutil.rmtree(run / name)
        else:
            (run / name).unlink()
    page = write_run_report([run], folder / "page.html", None).read_text()
    assert Outline(page).open == []
    lacking = re.findall("<li>(.*?)</li>", page)
    assert "No evaluation: launch/evaluate.py makes one." in lacking
    for sentence in said:
        assert any(f"instance_table: {sentence}" in line for line in lacking), lacking


def test_names_of_any_length_leave_room_for_the_data(folder: Path):
    long = "w" * 5000
    write_summary(folder, accuracy=ACCURACY | {long: 0.5}, noise_auc={long: 0.5})
    page = write_demo_report(folder).read_text()
    assert "w" * 100 not in page and Outline(page).open == []
    for run in ("baseline", "instance_table"):
        (folder / run).rename(folder / (run + "_" + "v" * 200))
    page = write_demo_report(folder).read_text()
    assert all("v" * 20 not in text for text in re.findall("<text.*?</text>", page, re.DOTALL))


def test_command(folder: Path, tmp_path: Path):
    done = subprocess.run([sys.executable, SCRIPT, folder], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"report: {folder / 'report.html'}\n")
    done = subprocess.run([sys.executable, SCRIPT, tmp_path], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path} holds neither a run (metrics.jsonl) nor")
    (tmp_path / "summary.json").write_text("{")
    done = subprocess.run([sys.executable, SCRIPT, tmp_path], capture_output=True, text=True)
    assert done.returncode == 2 and "summary.json is not JSON" in done.stderr


# --- training runs -----------------------------------------------------------------------------


@pytest.mark.parametrize("named", ["train", "."])
def test_training_shards_are_found_where_the_run_found_them(
    tiny_shards: Path, tmp_path: Path, named: str
):
    write_run(tmp_path, np.linspace(0, 2, 64))
    config = {"train_json_file": str(tiny_shards / named)}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert training_shards(Run.read(tmp_path)).path == tiny_shards / "train"


@pytest.fixture(scope="module")
def runs(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A baseline and an instance table of the tiny data set, and an evaluation of both."""
    root = tmp_path_factory.mktemp("runs")
    weights = np.linspace(0, 2, 64)
    write_run(root / "baseline")
    write_run(root / "my_table", weights)
    config = {"train_json_file": str(tiny_shards / "train"), "lr": 3e-4}
    (root / "my_table" / "config.yaml").write_text(yaml.safe_dump(config))
    generator = np.random.default_rng(0)
    prms = {
        label: [
            CandidateScores(q, str(q), c, "art" if q % 2 else HOSTILE, [float(s)], "A", c == q % 3)
            for q in range(20)
            for c, s in enumerate(generator.random(3))
        ]
        for label in ("baseline", "my_table")
    }
    results = compare(prms, {"baseline": "mean", "my_table": "mean"})
    write_results(root / "results.json", results)
    return [root / "baseline", root / "my_table"]


def test_page_of_runs(runs: list[Path], tiny_shards: Path, tmp_path: Path):
    results = runs[0].parent / "results.json"
    path = write_run_report(runs, tmp_path / "page.html", results)
    page = path.read_text()
    assert write_run_report(runs, tmp_path / "again.html", results).read_text() == page
    outline = Outline(page)
    assert outline.open == [] and len(outline.ids) == len(set(outline.ids))
    assert "<script" not in page and "http" not in page
    sources = re.findall(r'src="([^"]{0,30})', page)
    assert len(sources) == 8 and all(s.startswith("data:image/webp;base64,") for s in sources)
    # Intervals, accuracy against N, losses (3), weights (2), seconds.
    assert page.count('role="img"') == 8
    accuracy = read_results(results).accuracies("my_table")["min"]
    cells = next(cells for cells in outline.rows if cells[:1] == ["My table"] and len(cells) == 7)
    assert cells[2] == f"{accuracy:.1%}" and [cell[0] for cell in cells].count("★") == 1
    expected = effective_sample_size(np.linspace(0, 2, 64))
    assert ["My table", "100", "–", "0.050", "–", "–", "64", f"{expected:.0f}"] in outline.rows


def test_the_chosen_aggregation_is_marked(runs: list[Path], tmp_path: Path):
    results = read_results(runs[0].parent / "results.json")
    results.prms["my_table"].aggregation = "last"
    for on_meta, said in (
        ({}, "given to launch/evaluate.py"),
        ({n: {"mean": 0.25, "last": 0.75} for n in results.prms}, "the best on the meta set"),
    ):
        changed = replace(results, meta_accuracy=on_meta, chosen_on="m.json")
        write_results(tmp_path / "results.json", changed)
        page = write_run_report(runs, tmp_path / "page.html", tmp_path / "results.json").read_text()
        assert said in page and ("The same on the meta set, m.json" in page) == bool(on_meta)
        matrix = [row for row in Outline(page).rows if len(row) == 7]
        head, mine = (next(row for row in matrix if row[0] == name) for name in ("PRM", "My table"))
        assert [name for name, cell in zip(head, mine, strict=True) if "★" in cell] == ["last"]
        assert mine[1] == f"{results.accuracies('my_table')['mean']:.1%}"
        assert (head[:2] == ["PRM", "mean"]) and ("★ 75.0%" in page) == bool(on_meta)


def test_the_ends_of_the_weights_are_shown(runs: list[Path], tiny_shards: Path, tmp_path: Path):
    page = write_run_report(runs, tmp_path / "page.html", None).read_text()
    shown = re.findall(r"<h3>(Most \w+): weight ([\d.]+), instance ([^<]+)</h3>", page)
    shards = ShardFolder(tiny_shards / "train")
    names = {i: shards.read(i % 4, i // 4)["source_id"] for i in range(64)}
    raised, lowered = shown[:4], shown[4:]
    assert [name for _, _, name in raised] == [names[i] for i in (63, 62, 61, 60)]
    assert [name for _, _, name in lowered] == [names[i] for i in range(4)]
    assert raised[0][:2] == ("Most raised", "2.000") and lowered[0][:2] == ("Most lowered", "0")
    assert page.count("labelled right (+)") + page.count("labelled wrong (−)") == 8 * 3
    assert "have no evaluation yet" in page


def test_what_an_evaluation_left_out_is_said(runs: list[Path], tmp_path: Path):
    results = read_results(runs[0].parent / "results.json")
    write_results(tmp_path / "r.json", replace(results, num_rejected=1234, num_unscored=7))
    page = write_run_report(runs, tmp_path / "page.html", tmp_path / "r.json").read_text()
    assert "<li>1,234 records of the test file were rejected.</li>" in page
    assert f"<li>7 of {results.num_candidates} candidates could not be scored" in page
    page = write_run_report(runs, tmp_path / "page.html", runs[0].parent / "results.json")
    assert "rejected" not in page.read_text() and "not be scored" not in page.read_text()


def test_effective_sample_size():
    assert effective_sample_size(np.array([2.0, 2.0, 2.0])) == pytest.approx(3)
    assert effective_sample_size(np.array([1.0, 0.0, 0.0])) == pytest.approx(1)
    assert effective_sample_size(np.zeros(3)) == 0


def test_command_for_runs(runs: list[Path], tmp_path: Path):
    out = tmp_path / "page.html"
    command = [sys.executable, SCRIPT, *runs, "--out", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"report: {out}\n")
    (tmp_path / "results.json").write_text("{}")
    command += ["--results", tmp_path / "results.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "is no results.json" in done.stderr
