"""An evaluation's `results.json` as text for a terminal."""

NAMES = {
    "first": "first candidate",
    "random": "random candidate",
    "self_consistency": "self-consistency",
}


def text_table(results: dict) -> str:
    """The table, and under it the PRMs against each other, by subject, against N, and by step.

    Args:
        results: what `launch/evaluate.py` writes.
    """
    by_prm = results["aggregation"]["by_prm"]
    lines = [
        f"{results['num_questions']} questions, {results['num_candidates']} candidates "
        f"({results['num_unparsed']} without a parsed answer), "
        f"{results['num_rejected']} records rejected"
    ]
    rows = [("picked by", "right", "95 % interval", "over first", "95 % interval")]
    for row in results["table"]:
        star = "*" if by_prm.get(row["prm"]) == row["aggregation"] else ""
        rows.append(
            (
                NAMES.get(row["method"], row["method"]) + star,
                f"{row['accuracy']:.1%}",
                "{:.1%} to {:.1%}".format(*row["interval_95"]),
                f"{row['over_first']:+.1%}",
                "{:+.1%} to {:+.1%}".format(*row["over_first_interval_95"]),
            )
        )
    lines += _columns(rows)
    lines.append(f"* stands for its PRM below; chosen on {results['aggregation']['chosen_on']}")
    for row in results["between"]:
        low, high = row["interval_95"]
        lines.append(
            f"{row['prm']} over {row['over']}: {row['difference']:+.1%} "
            f"(95 % interval {low:+.1%} to {high:+.1%})"
        )
    methods = [*NAMES, *by_prm, "oracle"]
    if subjects := results["by_subject"]:
        rows = [("subject", "questions", *(NAMES.get(m, m) for m in methods))]
        for subject, row in subjects.items():
            cells = (f"{row[method]:.1%}" for method in methods)
            rows.append((subject, str(row["num_questions"]), *cells))
        lines += ["", *_columns(rows)]
    methods.remove("first")
    rows = [("N drawn by lot", *(NAMES.get(m, m) for m in methods))]
    rows += [(n, *(f"{row[m]:.1%}" for m in methods)) for n, row in results["by_n"].items()]
    lines += ["", *_columns(rows)]
    for label, row in results["steps"].items():
        auroc = "–" if row["auroc"] is None else f"{row['auroc']:.3f}"
        lines.append(
            f"{label}, {row['num_steps']} labelled steps: AUROC {auroc}, Brier score "
            f"{row['brier']:.3f}, calibration error {row['calibration_error']:.3f}"
        )
    return "\n".join(lines)


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
