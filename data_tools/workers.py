"""One function over many items: in this process, in worker processes, or in the ranks of mpirun."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import wait
from typing import TypeVar

from dreamprm_dist.errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")
InOrder = Callable[[Callable[[Item], Result], Iterable[Item]], Iterator[Result]]

AHEAD = 3  # items per worker that are under way or wait for their turn: bounds what is held


@contextmanager
def start_workers(count: int) -> Iterator[InOrder | None]:
    """Give a function that is called like `map` and works with ``count`` processes.

    Under mpirun with several ranks the first one leads and the others work, on any number of
    machines; those are given None, when there is nothing left to do.

    Raises:
        InputError: ``count`` is not positive, or given under mpirun too.
    """
    if count < 1:
        raise InputError(f"the number of workers must be 1 or more, not {count}.")
    sizes = map(os.environ.get, ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"))
    ranks = int(next(filter(None, sizes), 1))
    if ranks > 1:
        if count > 1:
            raise InputError("under mpirun the ranks are the workers; leave out --workers.")
        # mpi4py initialises MPI on import, which only a process that mpirun started should do.
        from mpi4py import MPI
        from mpi4py.futures import MPICommExecutor

        with MPICommExecutor(MPI.COMM_WORLD, root=0) as executor:
            ahead = AHEAD * (ranks - 1)
            # An MPIPoolExecutor, which mpi4py's annotations do not say.
            yield None if executor is None else partial(_in_order, executor, ahead)  # type: ignore[arg-type]
    elif count > 1:
        # spawn: a forked worker would inherit locks, and the threads of whoever calls this.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(count, context, initializer=_start_worker) as executor:
            yield partial(_in_order, executor, AHEAD * count)
    else:
        yield map


def _in_order(
    executor: Executor, ahead: int, function: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[Result]:
    pending: deque[Future] = deque()
    try:
        for item in items:
            pending.append(executor.submit(function, item))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenExecutor as error:
        raise ChildProcessError(
            "a worker was killed (out of memory?); what is finished is kept: run again, with fewer "
            "--workers."
        ) from error
    finally:
        for future in pending:
            future.cancel()


def _start_worker() -> None:
    """End at Ctrl-C, and with the parent: a worker of a killed one would wait for ever."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of each worker
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
