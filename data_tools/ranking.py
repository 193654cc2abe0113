"""Scores that training records are chosen by without training a reweighter.

They come from the Monte Carlo roll-outs behind a record's labels, or from a PRM's losses.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

from data_tools.record_files import with_source_id
from dreamprm_dist.data.instance_values import InstanceValues, repeated
from dreamprm_dist.errors import InputError, RecordError

# From a record, its file and its line to a score, of which the highest is drawn first. It is exact,
# so that records which are equally good are drawn by chance and not by rounding.
Score = Callable[[dict, Path, int], Fraction]

ALPHA = Fraction(1, 20)  # of BIS: what a solution counts whose steps are all alike
NO_TURNS = "'conversations' is no list of turns; convert the file first."
NO_COUNTS = "no step has roll-out counts to rank by."
NO_LOSS = "the instance losses have no number for its id."


def mc_counts(turns: list[dict]) -> list[tuple[int, int]]:
    """(right roll-outs, roll-outs) of each step that any was started from.

    Raises:
        RecordError: counts that cannot be.
    """
    counts = []
    for step, turn in enumerate((turn for turn in turns if turn["from"] == "gpt"), start=1):
        correct, total = (turn.get(f"num_mc_{name}") for name in ("correct", "total"))
        if correct is None or total is None:
            continue
        if not (_is_count(correct) and _is_count(total) and correct <= total):
            raise RecordError(
                f"step {step} has num_mc_correct {correct!r} of num_mc_total {total!r}; give whole "
                "numbers, the first not above the second."
            )
        if total:
            counts.append((correct, total))
    return counts


def bis(counts: list[tuple[int, int]]) -> Fraction:
    """Balanced-Information Score (arXiv:2602.04145): (p (1 - p) + alpha) R.

    p is the share of steps with an MC score above 0, R the mean MC score of these, or 1 where there
    are none: solutions with right and wrong steps, and reliable right ones.
    """
    scores = [Fraction(correct, total) for correct, total in counts]
    positive = [score for score in scores if score > 0]
    p = Fraction(len(positive), len(scores))
    reliability = sum(positive, Fraction(0)) / len(positive) if positive else Fraction(1)
    return (p * (1 - p) + ALPHA) * reliability


def mc_agreement(counts: list[tuple[int, int]]) -> Fraction:
    """How far the roll-outs of a step agree, |2 k / n - 1|: the mean over the steps."""
    return sum(abs(Fraction(2 * k, n) - 1) for k, n in counts) / Fraction(len(counts))


BY_COUNTS = {"bis": bis, "mc_agreement": mc_agreement}
RANKINGS = ("bis", "small_loss", "mc_agreement")


def score_by(ranking: str, instance_losses: Path | None) -> Score:
    """The score of a ranking.

    Args:
        ranking: one of `RANKINGS`.
        instance_losses: for small_loss, what `--export_losses` of a run has written.

    Raises:
        InputError: losses without small_loss, or small_loss without them; a file that cannot be
            used.
    """
    if (ranking == "small_loss") != (instance_losses is not None):
        raise InputError(
            "small_loss needs --instance_losses, the export/instance_losses.parquet of a run."
            if instance_losses is None
            else f"--instance_losses is for --rank_by small_loss, not for {ranking}; leave it out."
        )
    if instance_losses is not None:
        return _by_loss(instance_losses)
    rank = BY_COUNTS[ranking]

    def score(record: dict, file: Path, line: int) -> Fraction:
        try:
            counts = mc_counts(record["conversations"])
        except (KeyError, TypeError) as error:
            raise RecordError(NO_TURNS) from error
        if not counts:
            raise RecordError(NO_COUNTS)
        return rank(counts)

    return score


def _by_loss(path: Path) -> Score:
    read = InstanceValues.read(path, "loss")
    if read.source_ids is None:
        raise InputError(f"{path}: has no source_id, by which records are found; add it.")
    if twice := repeated(read.source_ids):
        raise InputError(
            f"{path}: source_id {twice!r} has several losses, and which record has which cannot be "
            "told; give the records ids of their own and shard them again."
        )
    losses = {
        source_id: Fraction(loss)
        for source_id, loss in zip(read.source_ids, read.values.tolist(), strict=True)
        if abs(loss) < float("inf")  # also false of NaN: no step is labelled, or training broke
    }

    def score(record: dict, file: Path, line: int) -> Fraction:
        if (loss := losses.get(str(with_source_id(record, file, line).get("id")))) is None:
            raise RecordError(NO_LOSS)
        return -loss

    return score


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
