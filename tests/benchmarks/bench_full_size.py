"""Whole bi-level iterations of the full-size model: 0.94 billion parameters, random weights.

    python tests/benchmarks/bench_full_size.py [--out bench.json]
    python tests/benchmarks/bench_full_size.py --device cuda --out bench_gpu.json

InternVL3-1B on one rank. On a CPU `full_size`: float32, vision tower frozen, batches of one image
of one tile; wants 24 GiB of memory and 8 GB of disk. On a GPU all other settings: bf16, everything
trained, images of 7 tiles, batches of 1, 4 and 8 with and without checkpointed activations. Each
has a process of its own, so that none finds what another has left; out of memory is a result.

Of an iteration, by phase (lower, meta, hypergradient, upper): `peak_bytes`, the process's resident
set on a CPU, live tensors in PyTorch's allocator on a GPU, among them what stays between phases;
`seconds_by_phase`, medians; `flops`, those of matrix products, convolutions and attention, counted
with SDPA (not on a CPU: attention) and with what checkpointing computes again. `plain` is the same
lower steps without a meta level, just before the iteration, and `ratio` what the iteration takes of
their time; `share_of_peak` is of the card's dense bf16 FLOP/s.
"""

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from standin import make_data, make_run, saved_model, write_results
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dreamprm_dist import distributed
from dreamprm_dist.training.run import TrainingRun

ONE_TILE, SEVEN_TILES = (448, 448), (1344, 896)  # six tiles and a thumbnail


class Setting(NamedTuple):
    """What is measured: the size of lower and meta batches, that of their images, other flags."""

    batch_size: int
    image: tuple[int, int]
    flags: str


GHOST = "--hypergradient ghost"
CHECKPOINTED = "--gradient_checkpointing"
ON_CPU = "full_size"
SETTINGS = {
    ON_CPU: Setting(1, ONE_TILE, "--freeze_vision_tower"),
    **{
        f"full_size_{name}_b{size}{suffix}": Setting(size, SEVEN_TILES, f"{flags} {added}")
        for name, flags, sizes in (
            ("ghost_k1", GHOST, (1, 4, 8)),
            ("ghost_k4_all", f"{GHOST} --unroll_steps 4 --unroll_window all", (4,)),
        )
        for size in sizes
        for suffix, added in (("", ""), ("_checkpointed", CHECKPOINTED))
    },
    "full_size_jvp_b1": Setting(1, SEVEN_TILES, "--hypergradient jvp"),
}
# Dense bf16 FLOP/s by what is in a card's name, as its vendor states them.
PEAK_FLOPS = {
    "A100": 312e12,
    "H100 80GB HBM3": 989e12,
    "H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
}
OUT_OF_MEMORY = "out of memory"


class Phase(NamedTuple):
    """What a phase took in an iteration."""

    seconds: float = 0.0
    peak_bytes: int = 0
    flops: int = 0

    def then(self, other: "Phase") -> "Phase":
        return Phase(
            self.seconds + other.seconds,
            max(self.peak_bytes, other.peak_bytes),
            self.flops + other.flops,
        )


class Flops(TorchDispatchMode):
    """Counts them; `FlopCounterMode` hooks modules too, which a tap's inner pass does not bear."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func.overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=output)
        return output


class Meter:
    """Stands in for the trainer's `phases`.

    Attributes:
        counting: whether it counts FLOPs, which takes time.
        phases: by name, since they were last emptied.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self.counting = False
        self.phases: dict[str, Phase] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        cuda = self._device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        flops = Flops()
        start = time.perf_counter()
        with flops if self.counting else contextlib.nullcontext():
            yield
        if cuda:
            torch.cuda.synchronize(self._device)
            peak = torch.cuda.max_memory_allocated(self._device)
        else:
            status = Path("/proc/self/status").read_text()
            peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
        phase = Phase(time.perf_counter() - start, peak, flops.total)
        self.phases[name] = self.phases.get(name, Phase()).then(phase)


def measure(folder: Path, name: str, device: str, precision: str, repeats: int) -> dict | str:
    """A setting's results, or that it ran out of memory."""
    setting = SETTINGS[name]
    try:
        run = make_run(
            *(folder, folder.parent / "model", "--precision", precision, "--device", device),
            *("--batch_size", setting.batch_size, "--meta_batch_size", setting.batch_size),
            *setting.flags.split(),
        )
        return results(run, repeats)
    except torch.OutOfMemoryError:
        return OUT_OF_MEMORY
    finally:
        distributed.shutdown()


def results(run: TrainingRun, repeats: int) -> dict:
    trainer, data = run.trainer, run.data()
    trainer.phases = meter = Meter(run.device)
    counted = warm_up(run, meter)
    samples = []
    for _ in range(repeats):
        meter.phases = {}
        window, meta = next(data)
        with meter("plain"):
            for batches in window:
                trainer.engine.lower_step(
                    batches, lambda output, losses, b: torch.ones(len(b), device=losses.device)
                )
        start = time.perf_counter()
        trainer.iteration(window, meta)  # ends with the upper step's phase, which waits for the GPU
        samples.append((time.perf_counter() - start, meter.phases))
    iterations, phases = zip(*samples, strict=True)
    seconds = {name: statistics.median(p[name].seconds for p in phases) for name in phases[0]}
    peaks = {name: max(p[name].peak_bytes for p in phases) for name in phases[0]}
    iteration, plain = statistics.median(iterations), seconds["plain"]
    card = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "CPU"
    peak = next((flops for part, flops in PEAK_FLOPS.items() if part in card), None)
    return {
        "device": card,
        "seconds": iteration,
        "ratio": iteration / plain,
        "peak_gib": max(bytes for name, bytes in peaks.items() if name != "plain") / 2**30,
        "seconds_by_phase": seconds,
        # Keyed as the phases of a plan, that what it says may be put beside them.
        "peak_bytes": peaks,
        "flops": counted,
        "share_of_peak": peak and {n: f / seconds[n] / peak for n, f in counted.items()},
        "parameters": sum(p.numel() for p in run.trainer.engine.module.parameters()),
        "trained_parameters": sum(p.numel() for p in run.trainer.engine.parameters.values()),
    }


def warm_up(run: TrainingRun, meter: Meter) -> dict[str, int]:
    """An iteration, which also makes the optimizer's state; its FLOPs by phase.

    They are counted with SDPA: those of flash-attn's own operators are not known.
    """
    model = run.trainer.engine.module.model
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    meter.counting = True
    run.trainer.iteration(*next(run.data()))
    meter.counting = False
    model.set_attn_implementation(before)
    return {name: phase.flops for name, phase in meter.phases.items()}


def in_own_process(function: Callable, *arguments: object):
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 on a GPU")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, help="default: by device")
    parser.add_argument("--repeats", type=int, help="default: 5 on a GPU, 1 on a CPU")
    parser.add_argument("--divisor", type=int, default=1, help="a model so much smaller: a trial")
    arguments = parser.parse_args()
    cuda = arguments.device == "cuda"
    precision = arguments.precision or ("bf16" if cuda else "fp32")
    names = arguments.settings or ([n for n in SETTINGS if n != ON_CPU] if cuda else [ON_CPU])
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        # As large images have as many tiles, of a quarter of the tokens in a trial.
        tile = 448 if arguments.divisor == 1 else 224
        in_own_process(saved_model, folder / "model", arguments.divisor, tile)
        for image in {SETTINGS[name].image for name in names}:
            size = tuple(side * tile // 448 for side in image)
            make_data(folder / f"{image[0]}", 16, 8, size, solutions_per_question=1)
        for name in names:
            data = folder / f"{SETTINGS[name].image[0]}"
            repeats = arguments.repeats or (5 if cuda else 1)
            measured = in_own_process(measure, data, name, arguments.device, precision, repeats)
            write_results(arguments.out, {name: measured})


if __name__ == "__main__":
    main()
