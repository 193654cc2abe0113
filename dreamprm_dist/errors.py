"""Messages to whoever runs a command: what is wrong as one sentence, and the log."""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback

BAD_INPUT, BUG, INTERRUPTED = 2, 1, 130  # exit codes; a shell's for Ctrl-C is the last
# Set by deepspeed and torchrun, Open MPI, Intel MPI and Slurm for each process that they start.
LOCAL_RANKS = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")

OTHERS_SPEAK = 5  # seconds


class InputError(ValueError):
    """Something that a user gave cannot be used; the message says what, why, and what to do."""


class RecordError(InputError):
    """A record, or an image of it, that cannot be taken; the message is one sentence."""


def report_error(error: BaseException, say: bool | None = None) -> int:
    """Write what ended a command to stderr; returns the command's exit code.

    Bad input and what the system refuses are one sentence. Anything else is a bug of ours and
    keeps its traceback, on every rank.

    Args:
        say: whether this rank says such a sentence. By default the first one on each machine does
            at once, for all of them have read the same command line. Another one waits: when the
            first has failed too, the launcher ends it; when it has not, nobody else would say it.
    """
    if isinstance(error, KeyboardInterrupt):
        text, code = "\ninterrupted; start the same command again to go on", INTERRUPTED
    elif isinstance(error, InputError | OSError):
        text, code = f"error: {error}", BAD_INPUT
    else:
        traceback.print_exception(error)
        return BUG
    if say is None:
        if next((os.environ[name] for name in LOCAL_RANKS if name in os.environ), "0") != "0":
            time.sleep(OTHERS_SPEAK)
        say = True
    if say:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
    return code


def start_logging(rank: int = 0) -> None:
    """Log to stderr: rank 0 informs and warns, for what one rank notices all of them do."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter())
    for name in ("dreamprm_dist", "data_tools"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(logging.ERROR if rank else logging.INFO)


class _Formatter(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:
        if record.levelno <= logging.INFO:
            return record.message
        return f"{record.levelname.lower()}: {record.message}"
