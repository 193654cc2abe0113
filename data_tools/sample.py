"""Draw a sample of records, spread over the data sets: balanced by label and seeded, or the best.

    python -m data_tools.sample train.jsonl --n 20000 --seed 1 --out cold_start.jsonl

writes the chosen records in the order of the input, with image paths that start from the output's
folder. Equal input and flags give equal bytes. With `--rank_by` it takes the records that a score
puts first, see `ranking.py`.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from data_tools.ranking import NO_COUNTS, NO_LOSS, NO_TURNS, RANKINGS, score_by
from data_tools.record_files import (
    RecordWriter,
    add_output,
    image_prefix,
    read_with_progress,
    with_prefix,
    with_source_id,
)
from dreamprm_dist.data.json_records import read_json_records
from dreamprm_dist.data.schema import require_object, step_labels
from dreamprm_dist.errors import InputError, RecordError
from dreamprm_dist.flags import CommandParser, run

BALANCES = ("final", "steps", "none")
NO_LABEL = "no step has a label to balance by."
NO_FINAL_LABEL = "every label is + and the last step has none; --balance steps takes it as +."
RANKED = ""  # the class of all records where the best are taken


def label_class(record: dict, balance: str) -> str | None:
    """The class of a record, ``+`` or ``-``; None when it has no label to tell by.

    ``final``: by ``true_false`` where there is one, else by the last step; where no roll-out
    visited that, ``-`` when any step is ``-``: VisualPRM visits nothing after a wrong step.
    ``steps``: ``-`` when any step is ``-``, ``+`` when none is and some step is labelled.
    ``none``: always ``+``.
    """
    if balance == "none":
        return "+"
    if balance == "final" and isinstance(record.get("true_false"), bool):
        return "+" if record["true_false"] else "-"
    labels = step_labels(record["conversations"])
    if balance == "final" and labels and labels[-1]:
        return labels[-1]
    if "-" in labels:
        return "-"
    return "+" if balance == "steps" and "+" in labels else None


def allocate(n: int, sizes: Mapping[str, int], available: Mapping[str, int]) -> dict[str, int]:
    """Split n draws over data sets in proportion to ``sizes``, none above what is ``available``.

    What a data set cannot give is shared among the others in the same proportion; fractions go to
    the largest remainders, then by name. The sum of ``available`` must be n or more.
    """
    quotas = dict.fromkeys(available, 0)
    while left := n - sum(quotas.values()):
        open_sets = sorted(name for name in quotas if quotas[name] < available[name])
        total = sum(sizes[name] for name in open_sets)
        # Integers: shares of a large n must not depend on rounding.
        shares = {name: divmod(left * sizes[name], total) for name in open_sets}
        extra = left - sum(whole for whole, _ in shares.values())
        by_remainder = sorted(open_sets, key=lambda name: -shares[name][1])
        for i, name in enumerate(by_remainder):
            share = shares[name][0] + (i < extra)
            quotas[name] = min(available[name], quotas[name] + share)
    return quotas


class Sample(NamedTuple):
    """What was counted and drawn.

    Attributes:
        available, drawn: for each data set, how many records of each class there are and were
            drawn.
        left_out: how many records were not counted, for each reason.
        writer: of the sample.
    """

    available: dict[str, Counter[str]]
    drawn: dict[str, Counter[str]]
    left_out: Counter[str]
    writer: RecordWriter

    def summary(self) -> str:
        """A line for each data set, each reason and the sample."""
        lines = []
        for name, available in sorted(self.available.items()):
            drawn = self.drawn[name]
            classes = [f"{drawn[k]} of {available[k]} {k}".rstrip() for k in sorted(available)]
            lines.append(f"{name or '(no data set)'}: {', '.join(classes)}")
        lines += [f"{count} left out: {reason}" for reason, count in self.left_out.items()]
        return "\n".join([*lines, self.writer.summary("records", "left out")])


def sample_file(
    source: str | Path,
    out: str | Path,
    n: int,
    *,
    seed: int = 1,
    balance: str | None = None,
    rank_by: str | None = None,
    instance_losses: Path | None = None,
    overwrite: bool = False,
) -> Sample:
    """Write n records of ``source`` to ``out``: half ``+`` and half ``-``, the odd one ``+``.

    Each half is spread over the data sets in proportion to their sizes. With ``rank_by`` there are
    no halves, and the best of each data set are taken; among equals the seed chooses. Records that
    cannot be read or have nothing to balance or rank by are listed in ``<out>.rejected.jsonl``.

    Args:
        balance: see `label_class`; final unless ``rank_by`` is given.
        rank_by, instance_losses: see `score_by`.

    Raises:
        FileNotFoundError: no such source.
        InputError: n is not positive, a class has too few records, ``out`` is taken, or flags
            contradict each other.
    """
    source, out = Path(source), Path(out)
    if n < 1:
        raise InputError(f"the sample must have 1 record or more, not {n}.")
    if rank_by and balance:
        raise InputError("--rank_by takes the best of all records; leave --balance out with it.")
    if instance_losses and not rank_by:
        raise InputError("--instance_losses is for --rank_by small_loss; leave it out.")
    score = score_by(rank_by, instance_losses) if rank_by else None
    balance = balance or "final"
    prefix = image_prefix(source.parent, out)
    wanted = {"+": n - n // 2, "-": n // 2}
    if score or balance == "none":
        wanted = {RANKED if score else "+": n}
    strata: dict[str, dict[str, list[int]]] = {label: defaultdict(list) for label in wanted}
    sizes: Counter[str] = Counter()  # what has nothing to be ranked by is of the data set too
    scores: dict[int, Fraction] = {}
    left_out: Counter[str] = Counter()
    inputs = [source, *([instance_losses] if instance_losses else [])]
    with RecordWriter(out, overwrite, inputs) as writer:
        for line, raw in read_with_progress(source):
            try:
                known = require_object(raw)
                dataset, label = _facts(known, "none" if score else balance)
                sizes[dataset] += 1
                if score:
                    label, scores[line] = RANKED, score(known, source, line)
            except RecordError as error:
                writer.reject(source, line, raw, str(error))
                by_name = str(error) in (NO_LABEL, NO_FINAL_LABEL, NO_COUNTS, NO_LOSS)
                left_out[str(error) if by_name else "cannot be read."] += 1
            else:
                strata[label][dataset].append(line)
        chosen = _choose(strata, wanted, sizes, seed, scores)
        for line, record in read_json_records(source):
            if line in chosen:
                assert isinstance(record, dict), f"{source} changed while it was read"
                writer.write(with_prefix(with_source_id(record, source, line), prefix))
    available: dict[str, Counter[str]] = defaultdict(Counter)
    drawn: dict[str, Counter[str]] = defaultdict(Counter)
    for label, sets in strata.items():
        for name, lines in sets.items():
            available[name][label] = len(lines)
    for name, label in chosen.values():
        drawn[name][label] += 1
    return Sample(available, drawn, left_out, writer)


def _facts(record: dict, balance: str) -> tuple[str, str]:
    dataset = record.get("dataset") or ""
    try:
        label = label_class(record, balance)
    except (KeyError, TypeError) as error:
        raise RecordError(NO_TURNS) from error
    if not isinstance(dataset, str):
        raise RecordError("'dataset' must be text.")
    if label is None and label_class(record, "steps"):
        raise RecordError(NO_FINAL_LABEL)
    if label not in ("+", "-"):
        raise RecordError(NO_LABEL)
    return dataset, label


def _choose(
    strata: dict[str, dict[str, list[int]]],
    wanted: Mapping[str, int],
    sizes: Mapping[str, int],
    seed: int,
    scores: Mapping[int, Fraction],
) -> dict[int, tuple[str, str]]:
    """From the chosen lines to (data set, class): at random, or where there are scores the best.

    Args:
        wanted: how many of each class.
        sizes: of the data sets, which each class is shared by.
    """
    chosen = {}
    for label, sets in strata.items():
        available = {name: len(lines) for name, lines in sets.items()}
        if wanted[label] > (total := sum(available.values())):
            if label == RANKED:
                raise InputError(
                    f"{wanted[label]} records are wanted and {total} can be ranked; lower --n."
                )
            raise InputError(
                f"{wanted[label]} records of class {label} are wanted and there are {total}; "
                "lower --n or choose another --balance."
            )
        for name, quota in allocate(wanted[label], sizes, available).items():
            # An order of its own for each: a new data set does not change what others draw first.
            order = list(sets[name])
            random.Random(f"{seed}/{label}/{name}").shuffle(order)
            if scores:
                order.sort(key=scores.__getitem__, reverse=True)  # equals stay as they are
            for line in order[:quota]:
                chosen[line] = (name, label)
    return chosen


def main(argv: list[str] | None = None) -> None:
    """Command line: see ``--help``."""
    parser = CommandParser(
        prog="python -m data_tools.sample",
        description="Draw a seeded sample of records, half positive and half negative, in "
        "proportion to the data sets; or with --rank_by those that are best by a score.",
    )
    add = parser.add_argument
    add("source", type=Path, help="records, JSONL or a JSON list")
    add("--n", type=int, required=True, help="records to draw")
    add("--seed", type=int, default=1, help="(default: 1)")
    add(
        "--balance",
        choices=BALANCES,
        help="what makes a record negative: its final label (a - before it where no roll-out came "
        "so far), any - step, or nothing (default: final)",
    )
    add(
        "--rank_by",
        choices=RANKINGS,
        help="take the best of each data set, and not half of each class: by BIS "
        "(arXiv:2602.04145), by the smallest loss of a PRM, or by how far roll-outs agree",
    )
    add(
        "--instance_losses",
        type=Path,
        help="small_loss: export/instance_losses.parquet of a run with --export_losses",
    )
    add_output(parser)
    args = parser.parse_args(argv)
    sample = sample_file(
        args.source,
        args.out,
        args.n,
        seed=args.seed,
        balance=args.balance,
        rank_by=args.rank_by,
        instance_losses=args.instance_losses,
        overwrite=args.overwrite,
    )
    print(sample.summary())


if __name__ == "__main__":
    run(main)
