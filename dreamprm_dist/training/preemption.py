"""Signals as a request to stop, which all ranks obey after the same iteration."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal

import torch

from dreamprm_dist import distributed

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Within the block each of these is noted instead of ending the process."""

    def __init__(self, device: torch.device):
        self._device, self._noted = device, False

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, frame) -> None:
        if distributed.rank() == 0 and not self._noted:
            os.write(2, b"\nstopping after this iteration, with a checkpoint\n")
        self._noted = True

    def noted(self) -> bool:
        """Whether any rank has been asked to stop: the same answer on all ranks, which all ask."""
        noted = torch.tensor([float(self._noted)], device=self._device)
        return bool(distributed.all_reduce_max(noted))


def leave_signals_to_the_rank(worker: int) -> None:
    """For a rank's worker processes: a signal to the whole process group must not end them."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """With their rank, also when it fails: multiprocessing would wait for them to heed SIGTERM."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where torch would report them as failures
    for worker in multiprocessing.active_children():
        worker.kill()
