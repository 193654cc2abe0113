"""Bytes of live tensors in the phases of real work: the allocator's on a GPU, else the profiler's.

On a CPU the resident set would also hold what the allocator and libraries keep.
"""

import contextlib
import gc
import json
import math
import statistics
import tempfile
import weakref
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from dreamprm_dist import distributed

PHASE, START = "phase: ", "phases start"


class PhasePeaks:
    """Stands in for a trainer's `phases`; make it before the run is made.

    On a CPU enter it and leave it around all of the work; several repeats make it sure.

    Attributes:
        peaks: once it is left, the most bytes of tensors in each phase; on a CPU of those that were
            not there before.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._others = weakref.WeakSet(_storages(device))
        self._starts: list[int] = []
        self.peaks: dict[str, int] = {}

    def start(self) -> None:
        """Begin a repeat of the phases."""
        for _ in range(8):  # has gloo's threads let go of what they held last
            distributed.all_reduce_sum(torch.zeros(1, device=self._device))
        own = (storage for storage in _storages(self._device) if storage not in self._others)
        self._starts.append(sum({s.data_ptr(): s.nbytes() for s in own}.values()))
        with record_function(START):
            pass

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            yield
            peak = torch.cuda.max_memory_allocated(self._device)
            self.peaks[name] = max(self.peaks.get(name, 0), peak)
        else:
            with record_function(PHASE + name):
                yield

    def __enter__(self) -> "PhasePeaks":
        if self._device.type != "cuda":
            self._profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profiler.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._device.type != "cuda":
            self._profiler.__exit__(None, None, None)
        if self._device.type != "cuda" and error[0] is None:
            changes = _changes(self._profiler)
            # Now and then a block is not seen to go, for a thread of gloo held it last.
            self.peaks = {
                name: statistics.median_low(
                    start + change[name]
                    for start, change in zip(self._starts, changes, strict=True)
                )
                for name in changes[0]
            }


def _storages(device: torch.device) -> list[torch.UntypedStorage]:
    gc.collect()
    found = [x for x in gc.get_objects() if type(x) in (Tensor, torch.nn.Parameter)]
    return [x.untyped_storage() for x in found if x.device.type == device.type]


def _changes(profiler: profile) -> list[dict[str, int]]:
    """By repeat the most bytes in each phase over what was there at the repeat's start."""
    spans, live = live_over_time(profiler)
    starts = [span.start for span in spans if span.name == START]
    found: list[dict[str, int]] = []
    for start, end in pairwise([*starts, math.inf]):
        before, peaks = live.at(start), {}
        for span in spans:
            if start < span.start < end:
                name = span.name.removeprefix(PHASE)
                peaks[name] = max(peaks.get(name, 0), live.peak(span) - before)
        found.append(peaks)
    return found


class Span(NamedTuple):
    """A block under `record_function`, in the profiler's microseconds."""

    name: str
    start: float
    end: float


class Live:
    """Bytes of the blocks that a profiler has seen come and not yet go.

    Args:
        changes: the time of each in order, and the bytes from then on.
    """

    def __init__(self, changes: Sequence[tuple[float, int]]):
        self._times = [time for time, _ in changes]
        self._bytes = [size for _, size in changes]

    def at(self, time: float) -> int:
        """Just before a time."""
        place = bisect_left(self._times, time)
        return self._bytes[place - 1] if place else 0

    def peak(self, span: Span) -> int:
        """The most within a block."""
        first, last = bisect_left(self._times, span.start), bisect_right(self._times, span.end)
        return max([self.at(span.start), *self._bytes[first:last]])


def live_over_time(profiler: profile) -> tuple[list[Span], Live]:
    """The blocks of `record_function` in their order, and the live bytes meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    events.sort(key=lambda event: event.get("ts", 0))
    spans = [
        Span(event["name"], event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") == "user_annotation"
    ]
    blocks: dict[int, int] = {}  # bytes by address
    changes: list[tuple[float, int]] = []
    live = 0
    for event in events:
        if event.get("name") == "[memory]":
            address, size = event["args"]["Addr"], event["args"]["Bytes"]
            # Freed now; or before, unseen, if this is a new block in its place.
            live -= blocks.pop(address, 0)
            if size > 0:
                blocks[address] = size
                live += size
            changes.append((event["ts"], live))
    return spans, Live(changes)
