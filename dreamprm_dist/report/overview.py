"""The page about training runs: accuracies, weights, and where time went."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib

from dreamprm_dist.errors import InputError
from dreamprm_dist.evaluation.benchmarks.results import is_benchmark
from dreamprm_dist.evaluation.results import Results, read_results
from dreamprm_dist.files import refuse_overwriting
from dreamprm_dist.report.accuracy import (
    figure_by_n,
    figure_intervals,
    table_accuracy,
    table_aggregations,
    table_between,
    table_steps,
    table_subjects,
)
from dreamprm_dist.report.html import html_table, notes, whole_page, wrap
from dreamprm_dist.report.questions import question_cards
from dreamprm_dist.report.runs import Run, read_yaml
from dreamprm_dist.report.style import PLOT_STYLE, decimal, label_of, percent
from dreamprm_dist.report.training import (
    LOSSES,
    details_settings,
    figure_curve,
    figure_loss,
    figure_quantiles,
    figure_seconds,
)
from dreamprm_dist.report.weights import (
    effective_sample_size,
    figure_distribution,
    instances,
    table_datasets,
    training_shards,
)

RUN_FILES = ("metrics.jsonl", "config.yaml", "export")  # any of them makes a folder a run's


@matplotlib.rc_context(PLOT_STYLE)
def write_run_report(folders: Sequence[Path], out: Path, results: Path | None) -> Path:
    """Write one page about training runs; returns its path.

    Args:
        folders: run folders.
        out: the page to write.
        results: `results.json` of an evaluation of the runs' PRMs; by default that of the first
            run with one, `evaluation/results.json`.

    Raises:
        InputError: a folder holds no run, or a file is not what it should be.
    """
    read = (
        *("metrics.jsonl", "config.yaml", "export/instance_weights.parquet"),
        "evaluation/results.json",
    )
    refuse_overwriting([out], [results, *(folder / name for folder in folders for name in read)])
    for folder in folders:
        if not any((folder / name).exists() for name in RUN_FILES):
            raise InputError(
                f"{folder} holds neither a run ({RUN_FILES[0]}) nor a demo (summary.json); name a "
                "run folder of launch/train.py"
            )
    paths = [folder.resolve() for folder in folders]
    if len({*paths}) < len(paths):
        raise InputError("a run folder is named twice; name each once")
    runs = [Run.read(folder) for folder in folders]
    if len({run.name for run in runs}) < len(runs):  # runs of several seeds have one name
        common = os.path.commonpath(paths)
        names = (str(path.relative_to(common)) for path in paths)
        runs = [replace(run, name=name) for run, name in zip(runs, names, strict=True)]
    found = [folder / "evaluation" / "results.json" for folder in folders]
    results = results or next(filter(Path.is_file, found), None)
    if results and is_benchmark(results):
        raise InputError(f"{results} is a benchmark's; its folder alone makes a page of its own")
    evaluation = read_results(results) if results else None
    missing = [sentence for run in runs for sentence in run.missing()]
    if not evaluation:
        missing.append("No evaluation: launch/evaluate.py makes one.")
    elif evaluation.num_rejected:
        missing.append(f"{evaluation.num_rejected:,} records of the test file were rejected.")
    if evaluation and evaluation.num_unscored:
        number = f"{evaluation.num_unscored:,} of {evaluation.num_candidates:,}"
        missing.append(f"{number} candidates could not be scored, and were not picked.")
    weighted = [run for run in runs if len(run.weights)]
    by_data, ends = [], {}
    for run in weighted:
        try:
            shards = training_shards(run)
            by_data.append(wrap("wide", table_datasets(run, shards)))
            name = f"Instances at the ends, {label_of(run.name).lower()}"
            ends[name] = [instances(run, shards)]
        except (InputError, OSError) as error:
            missing.append(f"{run.name}: its instances cannot be shown: {error}.")
    sections = {
        "What is missing": [notes(missing)],
        "Runs": [wrap("wide", _table_runs(runs))],
        "Which solution is picked": _accuracy(evaluation) if evaluation else [],
        "Questions and picks": [_questions(evaluation, results)] if evaluation and results else [],
        "Losses and learning rates": [
            *(figure_loss(runs, loss) for loss in LOSSES),
            figure_curve(runs, "lr", "Learning rate"),
            figure_curve(runs, "meta_lr", "Learning rate of the weights"),
        ],
        "Weights": [
            figure_distribution(weighted),
            *map(figure_quantiles, runs),
            *by_data,
        ],
        **ends,
        "Where time goes": [
            figure_seconds(runs),
            figure_curve(runs, "samples_per_second", "Instances per second"),
        ],
        "Settings": [wrap("wide", "".join(map(details_settings, runs)))],
    }
    name = " and ".join(folder.resolve().name for folder in folders)
    page = whole_page(name, "Training runs", [_verdict(evaluation)], sections)
    out.write_text(page, encoding="utf-8")
    return out


def _accuracy(results: Results) -> list[str]:
    return [
        table_accuracy(results),
        wrap("stack", figure_intervals(results) + figure_by_n(results)),
        wrap("wide", table_aggregations(results)),
        table_between(results),
        table_steps({label: prm.steps for label, prm in results.prms.items()}),
        wrap("wide", table_subjects(results)),
    ]


def _questions(results: Results, path: Path) -> str:
    """Cards of the questions, found through the evaluation's own settings."""
    file = Path(results.test_json_file)
    root = Path(read_yaml(path.with_name("config.yaml")).get("image_root") or file.parent)
    return question_cards(results, path.with_name("scores.jsonl"), file, root)


def _table_runs(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        last = run.metrics.iloc[-1].to_dict() if len(run.metrics) else {}
        speed = run.metrics.get("samples_per_second")
        rows.append(
            (
                label_of(run.name),
                decimal(last.get("iteration"), 0),
                decimal(last.get("epoch"), 1),
                decimal(last.get("lower_loss"), 3),
                decimal(None if speed is None else float(speed.mean()), 1),
                decimal(last.get("peak_memory_gib"), 1),
                decimal(len(run.weights) or None, 0),
                decimal(effective_sample_size(run.weights) if len(run.weights) else None, 0),
            )
        )
    head = "Run", "Iterations", "Epochs", "Lower loss", "Instances per second", "Memory, GiB"
    sizes = "Weighted instances", "Effective sample size"
    return html_table(
        "The runs at their end; (Σw)² / Σw² is the effective size", head + sizes, rows
    )


def _verdict(results: Results | None) -> str:
    if not results:
        return "These runs have no evaluation yet."
    shares = (
        f"{label_of(label)} for {percent(results.accuracies(label)[prm.aggregation])}"
        for label, prm in results.prms.items()
    )
    return (
        f"Of {results.num_questions:,} questions the first candidate is right for "
        f"{percent(results.accuracies()['first'])}; a right solution is picked by "
        f"{', '.join(shares)}."
    )
