"""Steps of either level that were skipped because a loss or a gradient was NaN or infinite."""

from __future__ import annotations

from dreamprm_dist.errors import InputError


class SkippedSteps:
    """Counts them and ends the run when they do not cease; the same on all ranks.

    Args:
        limit: iterations in a row with a skipped step that end the run.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._in_iteration = self._in_row = self._not_taken = 0

    def note(self, skipped: bool) -> None:
        """Take a step into account."""
        self._in_iteration += skipped
        self._not_taken += skipped

    def end_iteration(self, iteration: int) -> None:
        """Say that all steps of an iteration were noted.

        Raises:
            InputError: it is the last of `limit` iterations in a row with a skipped step.
        """
        self._in_row = self._in_row + 1 if self._in_iteration else 0
        self._in_iteration = 0
        if self._in_row == self._limit:
            raise InputError(
                f"iteration {iteration}: a loss or gradient was NaN or infinite in "
                f"{self._in_row} iterations in a row (max_bad_steps), and the steps were skipped; "
                "lower lr or meta_lr, and look at the last lines of metrics.jsonl"
            )

    def take(self) -> int:
        """Skipped steps since the last call."""
        count, self._not_taken = self._not_taken, 0
        return count
