"""The run's record of itself: `metrics.jsonl`, phase timings."""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from dreamprm_dist.files import JsonLines, whole_lines, write_whole
from dreamprm_dist.training.trackers import Trackers

FIELDS = {
    "iteration": "outer iterations done",
    "epoch": "passes over the training data, a fraction",
    "lower_loss": "mean instance loss of the last lower batch, before its step",
    "weighted_loss": "the same, each instance times its weight: what the lower level minimises",
    "meta_loss": "mean meta loss of the meta batch",
    "meta_validation_loss": "mean meta loss of the held-out meta questions, at each checkpoint",
    "lr": "learning rate of the last lower step",
    "meta_lr": "learning rate of the upper step",
    "gradient_norm": "global norm of the lower gradient before clipping",
    "meta_gradient_norm": "norm of v, the meta gradient by the PRM's parameters",
    "hypergradient_norm": "global norm of the hypergradient by the raw weights",
    "weight_mean": "mean weight over all instances; with weight_min, _q05 … _q95, _max",
    "weight_domains": "domain_table: the weight of each data set",
    "samples_per_second": "training instances per second over all ranks",
    "seconds_data": "waiting for data, on rank 0, as all seconds",
    "seconds_lower": "lower steps; with ghost, the products in their backward passes too",
    "seconds_meta": "meta gradient",
    "seconds_hypergradient": "directional derivatives; with ghost, what remains of them",
    "seconds_upper": "upper step",
    "bad_steps": "steps since the last line that were skipped for a NaN or infinite value",
    "seconds_checkpoint": "the last checkpoint, in the line after it",
    "checkpoint_bytes": "its size",
    "peak_memory_gib": "most memory of a rank so far: live tensors in torch's GPU allocator, not "
    "its unused blocks, NCCL's buffers or the CUDA context; on a CPU the process's resident set",
}


def truncate(path: Path, iteration: int) -> None:
    """Drop the lines after an iteration, and a last one that was not written to its end."""
    kept = takewhile(lambda line: json.loads(line)["iteration"] <= iteration, whole_lines(path))
    write_whole(path, "".join(line + "\n" for line in kept))


class MetricsWriter:
    """Appends one JSON object per line and tells the trackers.

    Args:
        trackers: the run's, on rank 0; None on other ranks, where nothing is written.
    """

    def __init__(self, path: Path, trackers: Trackers | None):
        self._trackers = trackers
        self._lines = JsonLines(path) if trackers else None

    def write(self, values: dict[str, float]) -> None:
        if self._lines and self._trackers:
            # JSON has no NaN and no infinity.
            line = {
                k: None if isinstance(v, float) and not math.isfinite(v) else v
                for k, v in values.items()
            }
            self._lines.add(line)
            self._trackers.log(values, int(values["iteration"]))

    def close(self) -> None:
        if self._lines and self._trackers:
            self._lines.close()
            self._trackers.close()


class PhaseTimer:
    """Seconds spent in each named phase since the last `take`.

    On a GPU they are those of its stream, between two events: nothing waits for the GPU but `take`.
    """

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self._spans.append((name, start, self._now()))

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take(self) -> dict[str, float]:
        """`seconds_<phase>` of each phase; starts anew."""
        seconds: dict[str, float] = {}
        if self._on_gpu:
            torch.cuda.synchronize()
        for name, start, end in self._spans:
            span = start.elapsed_time(end) / 1000 if self._on_gpu else end - start
            seconds[f"seconds_{name}"] = seconds.get(f"seconds_{name}", 0.0) + span
        self._spans.clear()
        return seconds


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory so far: live tensors on the GPU, or the resident set of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on every platform

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
