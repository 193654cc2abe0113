"""Peak memory of a bi-level iteration over that of plain fine-tuning, in bytes of live tensors.

    python tests/benchmarks/bench_memory.py [--device cpu] [--out bench.json]

One rank, float32 on a CPU and bf16 on a GPU, a model with InternVL3-1B's proportions. One batch
serves as every lower batch and as the meta batch, so that all passes are of one size: `difference`
is the peak of an iteration minus the peak of a plain step on it. On a GPU the allocator says it; on
a CPU it is added up from the profiler's record of allocations, not from the resident set, which
also holds what allocator and libraries keep. For `ghost` it is to be at most `bound`: 1.1 times the
bytes of v, and the largest output of a module.
"""

import argparse
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from live_tensors import live_over_time
from standin import make_data, make_run, on_device, plain_step, saved_model, write_results
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.profiler import ProfilerActivity, profile, record_function

from dreamprm_dist import distributed
from dreamprm_dist.prm.batch import Batch
from dreamprm_dist.training.run import TrainingRun

BATCH_SIZE = 4
REPEATS = 2
# By estimator, the lower steps of an iteration.
MODES = {
    "ghost": {"k1_ghost": 1, "k8_ghost_all": 8},
    "jvp": {"k1_jvp": 1},
}

Part = Callable[[], object]


def peaks(parts: Mapping[str, Part], device: torch.device) -> dict[str, int]:
    """The most bytes of tensors in each part of some work that were not there at its start.

    The first part warms up: it makes what stays from then on.
    """
    names = [*parts, *list(parts)[1:] * (REPEATS - 1)]
    measure = _peaks_on_gpu if device.type == "cuda" else _peaks_on_cpu
    found = list(zip(names, measure([parts[name] for name in names]), strict=True))
    # The least: now and then a block is not seen to go, for a thread of gloo held it last.
    return {name: min(peak for other, peak in found if other == name) for name in parts}


def _peaks_on_gpu(parts: list[Part]) -> list[int]:
    found = []
    for part in parts:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        part()
        found.append(torch.cuda.max_memory_allocated() - before)
    return found


def _peaks_on_cpu(parts: list[Part]) -> list[int]:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for part in parts:
            with record_function("part"):
                part()
    spans, live = live_over_time(profiler)
    return [live.peak(span) - live.at(span.start) for span in spans if span.name == "part"]


@torch.no_grad()
def largest_output(prm: nn.Module, batch: Batch) -> int:
    """Bytes of the largest tensor that a module returns."""
    sizes = []

    def note(module: nn.Module, args: tuple, output: object) -> None:
        if isinstance(output, Tensor):
            sizes.append(output.nbytes)

    hook = register_module_forward_hook(note)
    prm(batch)
    hook.remove()
    return max(sizes)


def measure(run: TrainingRun, modes: Mapping[str, int]) -> dict[str, dict[str, float]]:
    trainer, engine = run.trainer, run.trainer.engine
    (batches, *_), _ = next(run.data())

    def iteration(steps: int) -> None:
        trainer.iteration([batches] * steps, batches)

    v = sum(tensor.nbytes for tensor in trainer.meta_gradient(batches)[0].values())
    largest = largest_output(engine.module, batches[0])
    bound = 1.1 * v + largest
    parts: dict[str, Part] = {
        "warm_up": partial(iteration, 1),
        "plain": partial(plain_step, run, batches),
    }
    parts |= {name: partial(iteration, steps) for name, steps in modes.items()}
    found = peaks(parts, run.device)
    differences = {name: found[name] - found["plain"] for name in modes}
    return {
        name: {
            "difference": difference,
            "v": v,
            "largest_output": largest,
            "bound": bound,
            "difference_over_bound": difference / bound,
            "plain_peak": found["plain"],
        }
        for name, difference in differences.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model = saved_model(folder / "model", divisor=4, image_size=224)
        make_data(folder, 16, 16, (448, 224))  # two tiles and a thumbnail
        for estimator, modes in MODES.items():
            run = make_run(
                *(folder, model, *on_device(arguments.device), "--hypergradient", estimator),
                *("--unroll_window", "all", "--batch_size", BATCH_SIZE),
            )
            results |= measure(run, modes)
    write_results(arguments.out, {"peak_memory": results})
    distributed.shutdown()


if __name__ == "__main__":
    main()
