"""One whole bi-level iteration of the full-size model: 0.94 billion parameters, random weights.

    python tests/benchmarks/bench_full_size.py [--out bench.json]
    python tests/benchmarks/bench_full_size.py --device cuda --precision bf16

InternVL3-1B with its vision tower frozen, one rank, batches of one image of one tile. Time, and the
peak of memory in each phase: the process's resident set on a CPU, allocations on a GPU. Wants
24 GiB of memory and 8 GB of disk.
"""

import argparse
import contextlib
import os
import tempfile
import time
from pathlib import Path

import torch
from standin import make_data, make_run, saved_model, write_results

from dreamprm_dist import distributed


class PeakMemory:
    """Stands in for the trainer's `phases`: notes the peak of memory in each."""

    def __init__(self, device: torch.device):
        self._device = device
        self.gib: dict[str, float] = {}
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str):
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        start = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            peak = torch.cuda.max_memory_allocated(self._device)
        else:
            status = Path("/proc/self/status").read_text()
            peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
        self.seconds[name] = time.perf_counter() - start
        self.gib[name] = max(self.gib.get(name, 0.0), peak / 2**30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        # A process of its own makes the model, whose memory would otherwise count.
        child = os.fork()
        if child == 0:
            saved_model(folder / "model", divisor=1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            raise SystemExit("making the model failed")
        make_data(folder, 2, 2, (448, 448))
        run = make_run(
            *(folder, folder / "model", "--precision", arguments.precision),
            *("--device", arguments.device, "--freeze_vision_tower"),
        )
        trainer = run.trainer
        trainer.phases = PeakMemory(run.device)
        batches = next(run.data())
        start = time.perf_counter()
        trainer.iteration(*batches)
        seconds = time.perf_counter() - start
    parameters = sum(p.numel() for p in trainer.engine.module.parameters())
    key = "full_size" if arguments.device == "cpu" else f"full_size_{arguments.precision}"
    write_results(
        arguments.out,
        {
            key: {
                "seconds": seconds,
                "peak_gib": max(trainer.phases.gib.values()),
                "peak_gib_by_phase": trainer.phases.gib,
                "seconds_by_phase": trainer.phases.seconds,
                "parameters": parameters,
                "trained_parameters": sum(p.numel() for p in trainer.engine.parameters.values()),
            }
        },
    )
    distributed.shutdown()


if __name__ == "__main__":
    main()
