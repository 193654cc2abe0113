"""A benchmark from its files to its results: PRMs judge labelled steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, ClassVar

import yaml

from dreamprm_dist.distributed import rank
from dreamprm_dist.errors import InputError
from dreamprm_dist.evaluation.benchmarks import BENCHMARKS
from dreamprm_dist.evaluation.benchmarks.base import (
    LabelledSolution,
    RejectedSolution,
    read_solutions,
)
from dreamprm_dist.evaluation.benchmarks.batches import (
    TEST,
    THRESHOLD,
    Batch,
    Key,
    ThresholdSet,
    batches_of,
    read_threshold_set,
    scores_by_index,
)
from dreamprm_dist.evaluation.benchmarks.measure import (
    choose_threshold,
    group_sizes,
    measure_prms,
)
from dreamprm_dist.evaluation.benchmarks.results import BenchmarkResults, Chosen
from dreamprm_dist.evaluation.benchmarks.table import text_table
from dreamprm_dist.evaluation.results import write_results
from dreamprm_dist.evaluation.run import (
    CONFIG,
    PARTS,
    REJECTED,
    RESULTS,
    SCORES,
    labelled,
    refuse_own_inputs,
    score_files,
    score_with_each,
)
from dreamprm_dist.evaluation.score_journal import ScoreJournal
from dreamprm_dist.evaluation.scoring import Scorer
from dreamprm_dist.evaluation.scoring_config import ComparisonConfig
from dreamprm_dist.files import json_line, write_whole
from dreamprm_dist.flags import Bounds, flag
from dreamprm_dist.prm.model import load_tokenizer

DEFAULT_THRESHOLD = 0.5


@dataclass
class BenchmarkConfig(ComparisonConfig):
    """Everything `launch/benchmark.py` is told."""

    _argument_group_name: ClassVar[str] = "benchmark"

    benchmark: str = flag("visualprocessbench", "Which benchmark.", choices=BENCHMARKS)
    test_json_file: list[str] = field(
        default_factory=lambda: ["./data/test.jsonl"],
        metadata={"help": "The benchmark's files as downloaded, one or several."},
    )
    out: str = flag(
        "./benchmark",
        "Folder for the results; made when it is not there.",
        aliases=["output_dir"],
    )
    threshold: Annotated[float, Bounds(above=0, below=1)] = flag(
        DEFAULT_THRESHOLD, "A step is judged right when its score is at least that."
    )
    threshold_json_file: str | None = flag(
        None, "Training or meta records: take each PRM's threshold of highest macro-F1 on them."
    )
    oracle_threshold: bool = flag(
        False, "Also report the threshold that is best on the test solutions, as some publish."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold_json_file and self.threshold != DEFAULT_THRESHOLD:
            raise InputError("give --threshold or --threshold_json_file, not both")
        if len({*map(Path, self.test_json_file)}) < len(self.test_json_file):
            raise InputError("a test_json_file is named twice; name each once")


def run_benchmark(config: BenchmarkConfig) -> str:
    """Score, measure and write the files that `launch/benchmark.py` names; by all ranks.

    Returns:
        The outcome as text on rank 0; nothing ("") elsewhere.

    Raises:
        InputError: a flag, a file or a model cannot be used, or there is no labelled step.
    """
    models, out = labelled(config.model), Path(config.out)
    refuse_own_inputs(out, models, [*config.test_json_file, config.threshold_json_file])
    benchmark = BENCHMARKS[config.benchmark]
    records = list(read_solutions(benchmark, config.test_json_file, config.limit))
    solutions = [record for record in records if isinstance(record, LabelledSolution)]
    rejected = [record for record in records if isinstance(record, RejectedSolution)]
    _require_labels(config, solutions, rejected)
    chosen_on = ThresholdSet([], [])
    if config.threshold_json_file:
        chosen_on = read_threshold_set(config.threshold_json_file)
    if not config.dry_run:
        out.mkdir(parents=True, exist_ok=True)
    with config.joined() as device:
        for model in models.values():
            load_tokenizer(model)
        if config.dry_run:
            return _plan(config, models, solutions, rejected, chosen_on) if rank() == 0 else ""
        files = {f"test_json_file {i}": file for i, file in enumerate(config.test_json_file)}
        if config.threshold_json_file:
            files["threshold_json_file"] = config.threshold_json_file
        settings = config.settings(models, files, device) | {
            "benchmark": config.benchmark,
            "image_root": config.image_root,
        }
        journal = ScoreJournal(out / PARTS, settings)
        journal.start()
        batches = list(batches_of(solutions))

        def keyed(label: str) -> Iterator[tuple[Key, Batch]]:
            for name, part in ((TEST, batches), (THRESHOLD, chosen_on.batches)):
                for batch in part:
                    yield Key(label, name, batch.first, len(batch.members)), batch

        score_with_each(config, models, device, journal, keyed, _score)
        return journal.finish(
            partial(_write, config, models, solutions, rejected, batches, chosen_on)
        )


def _require_labels(
    config: BenchmarkConfig,
    solutions: Sequence[LabelledSolution],
    rejected: Sequence[RejectedSolution],
) -> None:
    """Raise InputError where there is nothing to measure."""
    if any(label for solution in solutions for label in solution.labels):
        return
    files = ", ".join(config.test_json_file)
    if rejected:
        first = rejected[0]
        why = f"{len(rejected)} records were rejected, the first at line {first.line} of "
        raise InputError(
            f"{files}: no solution of {BENCHMARKS[config.benchmark].title} has a labelled step; "
            f"{why}{first.file}: {first.reason}"
        )
    raise InputError(f"{files}: there is no solution with a labelled step")


def _plan(
    config: BenchmarkConfig,
    models: Mapping[str, str],
    solutions: Sequence[LabelledSolution],
    rejected: Sequence[RejectedSolution],
    chosen_on: ThresholdSet,
) -> str:
    lines = [
        f"{BENCHMARKS[config.benchmark].title}, {name}: {size.num_solutions} solutions, "
        f"{size.num_right} right and {size.num_wrong} wrong steps, "
        f"{size.num_unlabelled} without a label"
        for name, size in group_sizes(solutions).items()
    ]
    if rejected:
        first = rejected[0]
        lines.append(
            f"{len(rejected)} records rejected, the first at line {first.line} of {first.file}: "
            f"{first.reason}"
        )
    if config.threshold_json_file:
        lines.append(
            f"{config.threshold_json_file}: {len(chosen_on.batches)} solutions to choose the "
            "threshold on"
        )
    lines += [f"{label}: {model}" for label, model in models.items()]
    return "\n".join(lines) + f"\nResults would go to {config.out}; nothing was written\n"


def _score(config: BenchmarkConfig, model: str, scorer: Scorer, batch: Batch) -> dict:
    root = Path(config.image_root or Path(batch.file).parent)
    return {"scores": score_files(root, model, scorer, batch)}


def _write(
    config: BenchmarkConfig,
    models: dict[str, str],
    solutions: Sequence[LabelledSolution],
    rejected: Sequence[RejectedSolution],
    batches: Sequence[Batch],
    chosen_on: ThresholdSet,
    scored: Mapping[tuple, dict],
) -> str:
    """Measure all scores, in the order of the solutions, and write the files."""
    out = Path(config.out)
    found = {label: scores_by_index(scored, label, TEST, batches) for label in models}
    # One that a single PRM cannot score is left out for all: the comparison is paired.
    unscored = {
        index: next(
            (f for f in (found[label][index] for label in models) if isinstance(f, str)), ""
        )
        for index in range(len(solutions))
    }
    left_out = [
        RejectedSolution(solutions[i].file, solutions[i].line, solutions[i].id, reason)
        for i, reason in unscored.items()
        if reason
    ]
    write_whole(out / REJECTED, "".join(json_line(r._asdict()) for r in chain(rejected, left_out)))
    kept = {i: solution for i, solution in enumerate(solutions) if not unscored[i]}
    if not any(label for solution in kept.values() for label in solution.labels):
        raise InputError(
            f"no solution with a labelled step could be scored; the first, line {left_out[0].line} "
            f"of {left_out[0].file}: {left_out[0].reason}"
        )
    scores = {
        label: {i: steps for i in kept if not isinstance(steps := of_prm[i], str)}
        for label, of_prm in found.items()
    }
    thresholds = {label: _threshold(config, scored, label, chosen_on) for label in models}
    prms, between = measure_prms(
        BENCHMARKS[config.benchmark],
        [*kept.values()],
        {label: [*of_prm.values()] for label, of_prm in scores.items()},
        thresholds,
        config.oracle_threshold,
        config.seed,
    )
    results = BenchmarkResults(
        benchmark=config.benchmark,
        models=models,
        test_json_files=config.test_json_file,
        threshold_chosen_on=config.threshold_json_file or "nothing: set by --threshold",
        num_rejected=len(rejected),
        num_unscored=len(left_out),
        num_stray_marks=sum(solution.num_stray_marks for solution in kept.values()),
        groups=group_sizes([*kept.values()]),
        prms=prms,
        between=between,
    )
    lines = (
        json_line(
            {"prm": label, "solution": i}
            | {name: getattr(solution, name) for name in ("file", "line", "id", "group", "images")}
            | {"step_labels": solution.labels, "step_scores": of_prm[i]}
        )
        for label, of_prm in scores.items()
        for i, solution in kept.items()
    )
    write_whole(out / SCORES, "".join(lines))
    write_results(out / RESULTS, results)
    flags = {name: value for name, value in vars(config).items() if name != "local_rank"}
    write_whole(out / CONFIG, yaml.safe_dump(flags, sort_keys=False, allow_unicode=True))
    return f"{text_table(results)}\nResults are in {out}\n"


def _threshold(
    config: BenchmarkConfig, scored: Mapping[tuple, dict], label: str, chosen_on: ThresholdSet
) -> tuple[float, Chosen | None]:
    """A PRM's threshold, and how it was chosen where it was."""
    if not config.threshold_json_file:
        return config.threshold, None
    found = scores_by_index(scored, label, THRESHOLD, chosen_on.batches)
    usable = [
        (labels, scores)
        for labels, scores in zip(chosen_on.labels, found.values(), strict=True)
        if not isinstance(scores, str)
    ]
    errors = [scores for scores in found.values() if isinstance(scores, str)]
    try:
        threshold, macro_f1 = choose_threshold(usable)
    except InputError as error:
        raise InputError(
            f"{config.threshold_json_file}: {label}: {error}; {len(errors)} of its {len(found)} "
            f"records could not be scored, the first: {errors[0]}"
        ) from error
    return threshold, Chosen(macro_f1=macro_f1, num_solutions=len(usable), num_unscored=len(errors))
