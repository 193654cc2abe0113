"""Draw a seeded sample of records, balanced by label and spread over the data sets.

    python -m data_tools.sample train.jsonl --n 20000 --seed 1 --out cold_start.jsonl

writes the chosen records in the order of the input, with image paths that start from the output's
folder. Equal input, n, seed and balance give equal bytes.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter, defaultdict
from pathlib import Path

from data_tools.record_files import RecordWriter, add_output, image_prefix, with_prefix
from dreamprm_dist.data.schema import read_json_records, require_object
from dreamprm_dist.errors import InputError, RecordError
from dreamprm_dist.flags import run

BALANCES = ("final", "steps", "none")


def label_class(record: dict, balance: str) -> str | None:
    """The class of a record, ``+`` or ``-``; None when it has no label to tell by.

    ``final``: by ``true_false`` where there is one, else by the last step. ``steps``: ``-`` when
    any step is ``-``, ``+`` when none is and some step is labelled. ``none``: always ``+``.
    """
    if balance == "none":
        return "+"
    if balance == "final" and isinstance(record.get("true_false"), bool):
        return "+" if record["true_false"] else "-"
    labels = [turn["value"] for turn in record["conversations"] if turn["from"] == "gpt"]
    if balance == "final":
        return labels[-1] if labels else None
    if "-" in labels:
        return "-"
    return "+" if "+" in labels else None


def allocate(n: int, sizes: dict[str, int], available: dict[str, int]) -> dict[str, int]:
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


def sample_file(
    source: str | Path,
    out: str | Path,
    n: int,
    *,
    seed: int = 1,
    balance: str = "final",
    overwrite: bool = False,
) -> dict[str, dict[str, int]]:
    """Write n records of ``source`` to ``out``: half ``+`` and half ``-``, the odd one ``+``.

    Each half is spread over the data sets in proportion to their sizes. Records that cannot be read
    or have no label to balance by are listed in ``<out>.rejected.jsonl``.

    Returns:
        For each data set, how many of each class were drawn.

    Raises:
        FileNotFoundError: no such source.
        InputError: n is not positive, a class has too few records, or ``out`` is taken.
    """
    source, out = Path(source), Path(out)
    if n < 1:
        raise InputError(f"the sample must have 1 record or more, not {n}.")
    if out.resolve() == source.resolve():
        raise InputError(f"{out}: this would overwrite the input; choose another name.")
    prefix = image_prefix(source.parent, out)
    strata: dict[str, dict[str, list[int]]] = {"+": defaultdict(list), "-": defaultdict(list)}
    with RecordWriter(out, overwrite) as writer:
        for line, raw in read_json_records(source):
            try:
                dataset, label = _facts(require_object(raw), balance)
            except RecordError as error:
                writer.reject(source, line, raw, str(error))
            else:
                strata[label][dataset].append(line)
        chosen = _choose(strata, n, seed, balance)
        for line, record in read_json_records(source):
            if line in chosen:
                assert isinstance(record, dict), f"{source} changed while it was read"
                writer.write(with_prefix(record, prefix))
    drawn: dict[str, dict[str, int]] = {}
    for dataset, label in chosen.values():
        drawn.setdefault(dataset, Counter())[label] += 1
    return {name: dict(drawn[name]) for name in sorted(drawn)}


def _facts(record: dict, balance: str) -> tuple[str, str]:
    dataset = record.get("dataset") or ""
    try:
        label = label_class(record, balance)
    except (KeyError, TypeError) as error:
        raise RecordError("'conversations' is no list of turns; convert the file first.") from error
    if not isinstance(dataset, str):
        raise RecordError("'dataset' must be text.")
    if label not in ("+", "-"):
        raise RecordError(f"no label to balance by ({balance}).")
    return dataset, label


def _choose(
    strata: dict[str, dict[str, list[int]]], n: int, seed: int, balance: str
) -> dict[int, tuple[str, str]]:
    """From the chosen lines to (data set, class)."""
    wanted = {"+": n, "-": 0} if balance == "none" else {"+": n - n // 2, "-": n // 2}
    sizes: Counter[str] = Counter()
    for sets in strata.values():
        sizes.update({name: len(lines) for name, lines in sets.items()})
    chosen = {}
    for label, sets in strata.items():
        available = {name: len(lines) for name, lines in sets.items()}
        if wanted[label] > (total := sum(available.values())):
            raise InputError(
                f"{wanted[label]} records of class {label} are wanted and there are {total}; "
                "lower --n or choose another --balance."
            )
        for name, quota in allocate(wanted[label], sizes, available).items():
            # An order of its own for each: a new data set does not change what others draw first.
            order = list(sets[name])
            random.Random(f"{seed}/{label}/{name}").shuffle(order)
            for line in order[:quota]:
                chosen[line] = (name, label)
    return chosen


def main(argv: list[str] | None = None) -> None:
    """Command line: see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.sample",
        description="Draw a seeded sample of records, half positive and half negative, in "
        "proportion to the data sets.",
    )
    add = parser.add_argument
    add("source", type=Path, help="records, JSONL or a JSON list")
    add("--n", type=int, required=True, help="records to draw")
    add("--seed", type=int, default=1, help="(default: 1)")
    add(
        "--balance",
        choices=BALANCES,
        default="final",
        help="what makes a record negative: its final label, any - step, or nothing (default: "
        "final)",
    )
    add_output(parser)
    args = parser.parse_args(argv)
    drawn = sample_file(
        args.source,
        args.out,
        args.n,
        seed=args.seed,
        balance=args.balance,
        overwrite=args.overwrite,
    )
    for name, counts in drawn.items():
        print(f"{name or '(no data set)'}: " + ", ".join(f"{c} {k}" for k, c in counts.items()))
    print(f"{args.out}: {args.n} records")


if __name__ == "__main__":
    run(main)
