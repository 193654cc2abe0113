"""Whole bi-level iterations of the full-size model: 0.94 billion parameters, random weights.

    python tests/benchmarks/bench_full_size.py [--out bench.json]
    python tests/benchmarks/bench_full_size.py --device cuda --out bench_gpu.json

InternVL3-1B on one rank. On a CPU `full_size`: float32, vision tower frozen, batches of one image
of one tile; wants 24 GiB of memory and 8 GB of disk. On a GPU all other settings: bf16, everything
trained, images of 7 tiles, batches of 1, 4 and 8 with and without checkpointed activations. Each
has a process of its own, so that none finds what another has left; out of memory is a result.

Of an iteration, by phase (lower, meta, hypergradient, upper): `peak_bytes` of live tensors, beside
`planned_peak_bytes`, what `launch/plan.py` says of it, which is to be within a tenth;
`seconds_by_phase`, medians; `flops`, those of matrix products, convolutions and attention. `ratio`
is what the iteration takes of the time of the same lower steps without a meta level, just before
it; `share_of_peak` is of the card's dense FLOP/s.
"""

import argparse
import contextlib
import statistics
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from live_tensors import PhasePeaks
from standin import make_data, make_run, plain_step, saved_model, write_results

from dreamprm_dist import distributed
from dreamprm_dist.planning.counter import Counter
from dreamprm_dist.planning.gpus import GPUS
from dreamprm_dist.planning.iteration import Counted, count_iteration
from dreamprm_dist.planning.workload import Workload
from dreamprm_dist.prm.attention import attention_in_use
from dreamprm_dist.prm.batch import Batch
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
# The plan's name of a card, by what is in CUDA's.
CARDS = {
    "A100": "a100-80",
    "H100": "h100-80",
    "H200": "h200-141",
    "B200": "b200-180",
    "L40S": "l40s-48",
    "4090": "rtx4090-24",
}
OUT_OF_MEMORY = "out of memory"


class PhaseFlops:
    """Stands in for the trainer's `phases`: FLOPs of each."""

    def __init__(self) -> None:
        self.flops: dict[str, int] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        with Counter() as counter:
            yield
        self.flops[name] = self.flops.get(name, 0) + counter.flops


def measure(folder: Path, name: str, device: str, precision: str, repeats: int) -> dict | str:
    """A setting's results, or that it ran out of memory."""
    setting = SETTINGS[name]
    try:
        with PhasePeaks(torch.device(device)) as peaks:
            run = make_run(
                *(folder, folder.parent / "model", "--precision", precision, "--device", device),
                *("--batch_size", setting.batch_size, "--meta_batch_size", setting.batch_size),
                *setting.flags.split(),
            )
            data, seconds_phases = run.data(), run.trainer.phases
            flops = count_flops(run, *next(data))  # in an iteration that warms up
            run.trainer.phases = peaks
            batches = next(data)
            peaks.start()
            run.trainer.iteration(*batches)
        planned = count_iteration(run.config, workload_of(run, batches[0][0][0]), 1, device)
        run.trainer.phases = seconds_phases
        return memory(peaks.peaks, planned) | times(run, data, flops, repeats)
    except torch.OutOfMemoryError:
        return OUT_OF_MEMORY
    finally:
        distributed.shutdown()


def count_flops(run: TrainingRun, *batches: Any) -> dict[str, int]:
    """FLOPs of an iteration by phase, with SDPA: those of flash-attn's operators are not known."""
    model, phases = run.trainer.engine.module.model, PhaseFlops()
    before = attention_in_use(model)
    model.set_attn_implementation("sdpa")
    run.trainer.phases = phases
    run.trainer.iteration(*batches)
    model.set_attn_implementation(before)
    return phases.flops


def workload_of(run: TrainingRun, batch: Batch) -> Workload:
    """The plan's view of a batch whose instances are alike."""
    size, tiles = len(batch), len(batch.shown_tiles) // len(batch)
    image_tokens = tiles * run.trainer.engine.module.tokens_per_tile
    return Workload(tiles, batch.input_ids.shape[1] - image_tokens, len(batch.step_rows) // size)


def memory(measured: dict[str, int], planned: Counted) -> dict:
    """Peaks of live tensors by phase, beside those that a plan says."""
    expected = dict(planned.peaks)
    expected["lower"] = max(expected["lower"], expected.pop("optimizer"))
    return {
        "peak_gib": max(measured.values()) / 2**30,
        "peak_bytes": measured,
        "planned_peak_bytes": {name: expected[name] for name in measured if name in expected},
        "planned_over_measured": {
            name: expected[name] / peak for name, peak in measured.items() if name in expected
        },
    }


def times(run: TrainingRun, data: Iterator, flops: dict[str, int], repeats: int) -> dict:
    trainer = run.trainer
    samples = []
    for _ in range(repeats):
        trainer.phases.take()
        window, meta = next(data)
        with trainer.phases("plain"):
            for batches in window:
                plain_step(run, batches)
        trainer.iteration(window, meta)
        samples.append(trainer.phases.take())
    seconds = {
        name.removeprefix("seconds_"): statistics.median(sample[name] for sample in samples)
        for name in samples[0]
    }
    plain = seconds.pop("plain")
    card = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "CPU"
    known = next((GPUS[name] for part, name in CARDS.items() if part in card), None)
    peak = known and known.tflops[run.config.model.precision] * 1e12
    return {
        "device": card,
        "seconds": sum(seconds.values()),
        "seconds_by_phase": seconds,
        "ratio": sum(seconds.values()) / plain,
        "flops": flops,
        "share_of_peak": peak and {n: f / seconds[n] / peak for n, f in flops.items()},
        "parameters": sum(p.numel() for p in trainer.engine.module.parameters()),
        "trained_parameters": sum(p.numel() for p in trainer.engine.parameters.values()),
    }


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
