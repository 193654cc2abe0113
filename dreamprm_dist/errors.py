"""Messages to whoever runs a command: what is wrong as one sentence, and the log."""

from __future__ import annotations

import logging
import sys
import traceback

BAD_INPUT, BUG = 2, 1  # exit codes; argparse ends with the first too


class InputError(ValueError):
    """Something that a user gave cannot be used; the message says what, why, and what to do."""


class RecordError(InputError):
    """A record, or an image of it, that cannot be taken; the message is one sentence."""


def report_error(error: Exception) -> int:
    """Write what ended a command to stderr; returns the command's exit code.

    Bad input and what the system refuses are one sentence. Anything else is a bug of ours and
    keeps its traceback.
    """
    if isinstance(error, InputError | OSError):
        sys.stderr.write(f"error: {error}\n")
        code = BAD_INPUT
    else:
        traceback.print_exception(error)
        code = BUG
    sys.stderr.flush()
    return code


def start_logging(rank: int = 0, world_size: int = 1) -> None:
    """Log to stderr: rank 0 informs, all ranks warn, each by its name where there are several."""
    handler = logging.StreamHandler()
    where = f"[rank {rank}] " if world_size > 1 else ""
    handler.setFormatter(_Formatter(where))
    for name in ("dreamprm_dist", "data_tools"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(logging.WARNING if rank else logging.INFO)


class _Formatter(logging.Formatter):
    def __init__(self, where: str):
        super().__init__()
        self._where = where

    def formatMessage(self, record: logging.LogRecord) -> str:
        if record.levelno <= logging.INFO:
            return record.message
        return f"{self._where}{record.levelname.lower()}: {record.message}"
