"""A benchmark's results as text for a terminal."""

from dreamprm_dist.evaluation.benchmarks import BENCHMARKS
from dreamprm_dist.evaluation.benchmarks.results import BenchmarkResults, Judged, Value
from dreamprm_dist.evaluation.table import columns

ORACLE = "ORACLE, chosen on the test solutions themselves"


def text_table(results: BenchmarkResults) -> str:
    """For each PRM its table; then the PRMs against each other, single steps, and oracles."""
    benchmark = BENCHMARKS[results.benchmark]
    sizes = results.groups.values()
    right, wrong = sum(size.num_right for size in sizes), sum(size.num_wrong for size in sizes)
    lines = [
        f"{benchmark.title}: {results.num_solutions} solutions, {right} right and {wrong} wrong "
        f"steps, {sum(size.num_unlabelled for size in sizes)} without a label; "
        f"{results.num_rejected} records rejected"
    ]
    if results.num_stray_marks:
        lines.append(f"{results.num_stray_marks} marks are of no step and count for nothing")
    if results.num_unscored:
        lines.append(
            f"{results.num_unscored} solutions could not be scored and are left out for all PRMs; "
            "rejected.jsonl says why"
        )
    for label, prm in results.prms.items():
        chosen = "as given"
        if prm.chosen:
            chosen = (
                f"chosen on {results.threshold_chosen_on}: macro-F1 {prm.chosen.macro_f1:.1%} "
                f"over {prm.chosen.num_solutions} solutions there"
            )
            if prm.chosen.num_unscored:
                chosen += f", {prm.chosen.num_unscored} could not be scored"
        lines += _judged(results, f"{label}, threshold {prm.judged.threshold:.4g}, {chosen}",
                         prm.judged)  # fmt: skip
    for pair in results.between:
        row = pair.rows[0]
        value = row.metrics[benchmark.headline]
        assert value.value is None or value.interval_95
        shown = "–"
        if value.value is not None and value.interval_95:
            low, high = value.interval_95
            shown = f"{value.value:+.1%} (95 % interval {low:+.1%} to {high:+.1%})"
        name = benchmark.metrics[benchmark.headline]
        lines.append(f"{pair.prm} over {pair.over}, {name}, {row.name}: {shown}")
    for label, prm in results.prms.items():
        auroc = "–" if prm.steps.auroc is None else f"{prm.steps.auroc:.3f}"
        lines.append(
            f"{label}, {prm.steps.num_steps} labelled steps: AUROC {auroc}, Brier score "
            f"{prm.steps.brier:.3f}, calibration error {prm.steps.calibration_error:.3f}"
        )
    for label, prm in results.prms.items():
        if prm.oracle:
            title = f"{label}, threshold {prm.oracle.threshold:.4g}, {ORACLE}"
            lines += _judged(results, title, prm.oracle)
    return "\n".join(lines)


def _judged(results: BenchmarkResults, title: str, judged: Judged) -> list[str]:
    benchmark = BENCHMARKS[results.benchmark]
    rows: list[tuple[str, ...]]
    rows = [(benchmark.groups, "solutions", *benchmark.metrics.values(), "95 % interval")]
    for row in judged.rows:
        size = results.groups.get(row.name)
        headline = row.metrics[benchmark.headline].interval_95
        rows.append(
            (
                row.name,
                str(size.num_solutions) if size else "",
                *map(_percent, row.metrics.values()),
                "{:.1%} to {:.1%}".format(*headline) if headline else "–",
            )
        )
    return ["", title, *columns(rows)]


def _percent(value: Value) -> str:
    return "–" if value.value is None else f"{value.value:.1%}"
