"""What a bi-level iteration costs over plain fine-tuning steps, within one run.

    python tests/benchmarks/bench_iteration.py [--out bench.json]

One rank, float32, a model with InternVL3-1B's proportions, images of several tiles. An iteration
of K lower steps stands against K plain steps on the same batches, without their loading, just
before it; medians over interleaved repeats.
By multiplications alone `iteration_ratio.k1_all` would be 3 and `k4_all` 1.5: a plain step is a
forward and a backward pass (1 + 2), and the iteration adds those of the meta batch (3) and a
forward pass with its tangents (3, as both factors of a product move). The optimizer's share of a
plain step makes them less, and so does a `hypergradient_scope`, which also spares the meta batch's
backward pass.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from standin import SOLUTIONS_PER_QUESTION, make_data, make_run, saved_model, write_results

from dreamprm_dist import distributed
from dreamprm_dist.training.run import TrainingRun

REPEATS = 7
BATCH_SIZE = 4
MODES = {
    "k1_all": (),
    "k1_language_model": ("--hypergradient_scope", "language_model"),
    "k1_last_2_layers": ("--hypergradient_scope", "last_2_layers"),
    "k4_all": ("--unroll_steps", 4),
}


def measure(run: TrainingRun, repeat: int) -> tuple[float, float, dict[str, float]]:
    """Seconds of K plain steps, of an iteration on the same batches, and of its phases."""
    trainer = run.trainer
    window, meta = next(run.data(done=repeat))
    start = time.perf_counter()
    for batches in window:
        trainer.engine.lower_step(batches, lambda output, losses, b: torch.ones(len(b)))
    middle = time.perf_counter()
    trainer.phases.take()
    trainer.iteration(window, meta)
    return middle - start, time.perf_counter() - middle, trainer.phases.take()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    arguments = parser.parse_args()
    ratios, seconds = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model = saved_model(folder / "model", divisor=4, image_size=224)
        make_data(folder, 64, 4 * SOLUTIONS_PER_QUESTION, (448, 224))  # two tiles and a thumbnail
        size = ("--batch_size", BATCH_SIZE, "--meta_batch_size", BATCH_SIZE)
        runs = {
            name: make_run(folder, model, "--precision", "fp32", *size, *flags)
            for name, flags in MODES.items()
        }
        grouped = make_run(
            *(folder, model, "--precision", "fp32", "--batch_size", SOLUTIONS_PER_QUESTION),
            *("--meta_batch_size", 1, "--group_meta_by_question"),
        )
        ungrouped = make_run(
            *(folder, model, "--precision", "fp32", "--batch_size", SOLUTIONS_PER_QUESTION),
            *("--meta_batch_size", SOLUTIONS_PER_QUESTION),
        )
        runs |= {"grouped": grouped, "ungrouped": ungrouped}
        samples: dict[str, list] = {name: [] for name in runs}
        for repeat in range(REPEATS + 1):
            for name, run in runs.items():
                sample = measure(run, repeat)
                if repeat:  # the first one warms up
                    samples[name].append(sample)
        for name in MODES:
            plain, bilevel, phases = zip(*samples[name], strict=True)
            ratios[name] = statistics.median(bilevel) / statistics.median(plain)
            seconds[name] = {
                "plain_steps": statistics.median(plain),
                "iteration": statistics.median(bilevel),
                **{key: statistics.median(p[key] for p in phases) for key in phases[0]},
            }
        meta_seconds = {
            name: statistics.median(phases["seconds_meta"] for _, _, phases in samples[name])
            for name in ("grouped", "ungrouped")
        }
    write_results(
        arguments.out,
        {
            "iteration_ratio": ratios,
            "iteration_seconds": seconds,
            # Eight solutions of one question: v with and without the shared vision pass.
            "grouped_meta": {
                "speedup": meta_seconds["ungrouped"] / meta_seconds["grouped"],
                "seconds": meta_seconds,
            },
        },
    )
    distributed.shutdown()


if __name__ == "__main__":
    main()
