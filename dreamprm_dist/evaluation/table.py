"""An evaluation's results as text for a terminal."""

from collections.abc import Sequence

from dreamprm_dist.evaluation.results import Results

NAMES = {
    "first": "first candidate",
    "random": "random candidate",
    "self_consistency": "self-consistency",
}


def text_table(results: Results) -> str:
    """The table, and under it the PRMs against each other, by subject, against N, and by step."""
    lines = [
        f"{results.num_questions} questions, {results.num_candidates} candidates "
        f"({results.num_unparsed} without a parsed answer), "
        f"{results.num_rejected} records rejected"
    ]
    rows: list[tuple[str, ...]]
    rows = [("picked by", "right", "95 % interval", "over first", "95 % interval")]
    for row in results.table:
        stands = row.prm and results.prms[row.prm].aggregation == row.aggregation
        rows.append(
            (
                NAMES.get(row.method, row.method) + ("*" if stands else ""),
                f"{row.accuracy:.1%}",
                "{:.1%} to {:.1%}".format(*row.interval_95),
                f"{row.over_first:+.1%}",
                "{:+.1%} to {:+.1%}".format(*row.over_first_interval_95),
            )
        )
    lines += columns(rows)
    lines.append(f"* stands for its PRM below; chosen on {results.chosen_on}")
    for pair in results.between:
        low, high = pair.interval_95
        lines.append(
            f"{pair.prm} over {pair.over}: {pair.difference:+.1%} "
            f"(95 % interval {low:+.1%} to {high:+.1%})"
        )
    methods = [*NAMES, *results.prms, "oracle"]
    if results.by_subject:
        rows = [("subject", "questions", *(NAMES.get(m, m) for m in methods))]
        for subject, accuracies in results.by_subject.items():
            cells = (f"{accuracies[method]:.1%}" for method in methods)
            rows.append((subject, str(accuracies["num_questions"]), *cells))
        lines += ["", *columns(rows)]
    methods.remove("first")
    rows = [("N drawn at random", *(NAMES.get(m, m) for m in methods))]
    rows += [(n, *(f"{row[m]:.1%}" for m in methods)) for n, row in results.by_n.items()]
    lines += ["", *columns(rows)]
    for label, prm in results.prms.items():
        if steps := prm.steps:
            auroc = "–" if steps.auroc is None else f"{steps.auroc:.3f}"
            lines.append(
                f"{label}, {steps.num_steps} labelled steps: AUROC {auroc}, Brier score "
                f"{steps.brier:.3f}, calibration error {steps.calibration_error:.3f}"
            )
    if results.num_unscored:
        lines.append(
            f"{results.num_unscored} candidates could not be scored and so were not chosen; "
            "`error` in scores.jsonl says why"
        )
    return "\n".join(lines)


def columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of a table whose first column is text and whose others are numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
