"""Peak memory of a bi-level iteration over that of plain fine-tuning, in bytes of live tensors.

    python tests/benchmarks/bench_memory.py [--out bench.json]

One rank, float32, a model with InternVL3-1B's proportions. One batch serves as every lower batch
and as the meta batch, so that all passes are of one size: the `difference` is that of the peak of
an iteration to the peak of a plain step on it. On a GPU the allocator says it; on a CPU it is added
up from the profiler's record of allocations, not from the resident set, which also holds what the
allocator and the libraries keep. For `ghost` it is to be at most `bound`: 1.1 times the bytes of v,
and the largest output of a module.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from standin import make_data, make_run, saved_model, write_results
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook
from torch.profiler import ProfilerActivity, profile, record_function

from dreamprm_dist import distributed
from dreamprm_dist.prm.batch import Batch
from dreamprm_dist.training.run import TrainingRun

BATCH_SIZE = 4
GHOST = ("--hypergradient", "ghost", "--unroll_window", "all")
MODES = {
    "k1_ghost": GHOST,
    "k8_ghost_all": (*GHOST, "--unroll_steps", 8),
    "k1_jvp": ("--hypergradient", "jvp"),
}
WARM_UP = "warm_up"


def peaks(parts: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, int]:
    """The most bytes of live tensors in each of several parts of work, taken in order.

    On a CPU they count from the start, and what was there before is not seen to go: the first part
    is to put whatever the others replace into memory of its own.
    """
    if device.type == "cuda":
        return {name: _peak_on_gpu(part, device) for name, part in parts.items()}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for name, part in parts.items():
            with record_function(name):
                part()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    live = [
        (event["ts"], event["args"]["Total Allocated"])
        for event in events
        if event.get("name") == "[memory]"
    ]
    spans = {event["name"]: event for event in events if event.get("name") in parts}
    return {
        name: max(size for at, size in live if span["ts"] <= at <= span["ts"] + span["dur"])
        for name, span in spans.items()
    }


def _peak_on_gpu(part: Callable[[], object], device: torch.device) -> int:
    torch.cuda.reset_peak_memory_stats(device)
    part()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


@torch.no_grad()
def largest_output(prm: torch.nn.Module, batch: Batch) -> int:
    """Bytes of the largest tensor that a module returns."""
    sizes = []

    def note(module: torch.nn.Module, args: tuple, output: object) -> None:
        if isinstance(output, Tensor):
            sizes.append(output.nbytes)

    hook = register_module_forward_hook(note)
    prm(batch)
    hook.remove()
    return max(sizes)


def measure(run: TrainingRun) -> dict[str, float]:
    trainer, engine = run.trainer, run.trainer.engine
    (batches, *_), _ = next(run.data())

    def plain() -> None:
        engine.lower_step(
            batches, lambda output, losses, b: torch.ones(len(b), device=losses.device)
        )

    def iteration() -> None:
        trainer.iteration([batches] * run.config.upper.unroll_steps, batches)

    v = sum(t.nbytes for t in trainer.meta_gradient(batches)[0].values())
    largest = largest_output(engine.module, batches[0])
    found = peaks({WARM_UP: iteration, "plain": plain, "iteration": iteration}, run.device)
    difference, bound = found["iteration"] - found["plain"], 1.1 * v + largest
    return {
        "difference": difference,
        "v": v,
        "largest_output": largest,
        "bound": bound,
        "difference_over_bound": difference / bound,
        "peaks": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    arguments = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model = saved_model(folder / "model", divisor=4, image_size=224)
        make_data(folder, 16, 16, (448, 224))  # two tiles and a thumbnail
        for name, flags in MODES.items():
            size = ("--batch_size", BATCH_SIZE, "--meta_batch_size", BATCH_SIZE)
            results[name] = measure(make_run(folder, model, "--precision", "fp32", *size, *flags))
    write_results(arguments.out, {"peak_memory": results})
    distributed.shutdown()


if __name__ == "__main__":
    main()
