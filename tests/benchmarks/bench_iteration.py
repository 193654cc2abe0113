"""What a bi-level iteration costs over plain fine-tuning steps, within one run.

    python tests/benchmarks/bench_iteration.py [--repeats 7] [--device cpu] [--out bench.json]

One rank, float32 on a CPU and bf16 on a GPU, a model with InternVL3-1B's proportions, images of
several tiles. An iteration of K lower steps stands against K plain steps on the same batches,
without their loading, just before it; medians over interleaved repeats. A meta batch is of the size
of a lower batch, each of its solutions with an image of its own, but for `k4_ghost_all_grouped`:
eight solutions of one question with one image, beside lower batches of eight.

`iteration_floor` is the ratio by multiplications alone. In units of a lower batch's forward pass,
with s the scope's share of it, n the lower batches that learn and m the meta batch's forward pass
(1, but for the grouped one),

    plain steps     3 K            a forward and a backward pass, 1 + 2
    ghost           n s            one product more for each layer
    jvp             n (1 + 2 s)    a forward pass with tangents, as both factors of a product move
    meta gradient   m (1 + 2 s)    forward, and back as far as the scope reaches

so that with ghost, `unroll_window all` and scope all it is (3 K + K + 3) / 3 K. s and m are counted
in forward passes of real batches by torch's `FlopCounterMode`, over the modules without children:
linear layers and the patches' convolution. The products of attention, which belong to no
parameters, are left out. `optimizer_share` is AdamW's part of the plain steps, which both sides
have and which brings the ratio down; what DeepSpeed does around it is not in it.

Targets of `iteration_ratio`: `k1_ghost` 2.4, `k4_ghost_all` 1.65, `k8_ghost_all` 1.55,
`k4_ghost_all_language_model` 1.35, `k4_ghost_all_grouped` 1.5, or less.
"""

import argparse
import contextlib
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from standin import (
    SOLUTIONS_PER_QUESTION,
    make_data,
    make_run,
    on_device,
    plain_step,
    saved_model,
    write_results,
)
from torch.utils.flop_counter import FlopCounterMode

from dreamprm_dist import distributed
from dreamprm_dist.prm.batch import Batch
from dreamprm_dist.training.metrics import PhaseTimer
from dreamprm_dist.training.run import TrainingRun

BATCH_SIZE = 4
GHOST = ("--hypergradient", "ghost", "--unroll_window", "all")
JVP = ("--hypergradient", "jvp")
MODES = {
    "k1_all": JVP,
    "k1_language_model": (*JVP, "--hypergradient_scope", "language_model"),
    "k1_last_2_layers": (*JVP, "--hypergradient_scope", "last_2_layers"),
    "k4_all": (*JVP, "--unroll_steps", 4),
    "k1_ghost": GHOST,
    "k4_ghost_all": (*GHOST, "--unroll_steps", 4),
    "k8_ghost_all": (*GHOST, "--unroll_steps", 8),
    "k4_ghost_all_language_model": (
        *GHOST, "--unroll_steps", 4, "--hypergradient_scope", "language_model",
    ),
}  # fmt: skip
# Eight solutions of one meta question, with and without a vision pass that they share.
GROUPED = ("--meta_batch_size", 1, "--group_meta_by_question")
MODES_OF_QUESTIONS = {
    "k4_ghost_all_grouped": (*GHOST, "--unroll_steps", 4, *GROUPED),
    "grouped": (*JVP, *GROUPED),
    "ungrouped": (*JVP, "--meta_batch_size", SOLUTIONS_PER_QUESTION),
}


class Sample(NamedTuple):
    """Seconds of K plain steps, their optimizer, an iteration on the same batches, its phases."""

    plain: float
    optimizer: float
    iteration: float
    phases: dict[str, float]


class Measured:
    """A run whose iterations are timed against plain steps."""

    def __init__(self, run: TrainingRun):
        self._run = run
        self._optimizer, self._in_step = PhaseTimer(run.device), contextlib.ExitStack()
        optimizer = run.trainer.engine.zero.optimizer
        optimizer.register_step_pre_hook(
            lambda *_: self._in_step.enter_context(self._optimizer("optimizer"))
        )
        optimizer.register_step_post_hook(lambda *_: self._in_step.close())

    def sample(self, repeat: int) -> Sample:
        trainer = self._run.trainer
        window, meta = next(self._run.data(done=repeat))
        self._optimizer.take()  # waits for the GPU, as what follows a measured part does
        start = time.perf_counter()
        for batches in window:
            plain_step(self._run, batches)
        optimizer = self._optimizer.take()["seconds_optimizer"]
        plain = time.perf_counter() - start
        trainer.phases.take()
        start = time.perf_counter()
        trainer.iteration(window, meta)
        phases = trainer.phases.take()
        return Sample(plain, optimizer, time.perf_counter() - start, phases)

    def floor(self) -> float:
        """Multiplications of an iteration over those of its plain steps; see above."""
        window, meta = next(self._run.data())
        upper = self._run.config.upper
        steps = upper.unroll_steps
        learning = steps if upper.unroll_window == "all" else 1
        forward, scope = self._multiplications(window[0][0])
        meta_forward, meta_scope = forward, scope
        if upper.group_meta_by_question:
            meta_forward, meta_scope = self._multiplications(meta[0])
        estimator = scope if self._run.trainer.ghost else forward + 2 * scope
        added = learning * estimator + meta_forward + 2 * meta_scope
        return 1 + added / (3 * steps * forward)

    @torch.no_grad()
    def _multiplications(self, batch: Batch) -> tuple[int, int]:
        """Those of a forward pass by parameters, and by parameters in the scope."""
        prm = self._run.trainer.engine.module
        scope = set(prm.parameters_in(self._run.config.hypergradient.hypergradient_scope))
        with FlopCounterMode(display=False) as counter:
            prm(batch)
        counts = counter.get_flop_counts()
        everywhere = within = 0
        for path, module in prm.named_modules():
            if any(module.children()):
                continue
            count = sum(counts.get(f"{type(prm).__name__}.{path}", {}).values())
            everywhere += count
            if any(f"{path}.{own}" in scope for own, _ in module.named_parameters()):
                within += count
        return everywhere, within


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model = saved_model(folder / "model", divisor=4, image_size=224)
        measured: dict[str, Measured] = {}
        for modes, size, solutions in (
            (MODES, BATCH_SIZE, 1),
            (MODES_OF_QUESTIONS, SOLUTIONS_PER_QUESTION, SOLUTIONS_PER_QUESTION),
        ):
            data = folder / f"solutions-{solutions}"
            # Two tiles and a thumbnail.
            make_data(data, 64, 32, (448, 224), solutions_per_question=solutions)
            sizes = ("--batch_size", size, "--meta_batch_size", size)
            for name, flags in modes.items():
                run = make_run(data, model, *on_device(arguments.device), *sizes, *flags)
                measured[name] = Measured(run)
        samples: dict[str, list[Sample]] = {name: [] for name in measured}
        for repeat in range(arguments.repeats + 1):
            for name, run in measured.items():
                sample = run.sample(repeat)
                if repeat:  # the first one warms up
                    samples[name].append(sample)
        floors = {name: run.floor() for name, run in measured.items()}
    results: dict[str, dict] = {
        "iteration_ratio": {},
        "iteration_floor": {},
        "optimizer_share": {},
        "iteration_seconds": {},
    }
    for name in [*MODES, "k4_ghost_all_grouped"]:
        plain, optimizer, iteration, phases = zip(*samples[name], strict=True)
        results["iteration_ratio"][name] = statistics.median(iteration) / statistics.median(plain)
        results["iteration_floor"][name] = floors[name]
        results["optimizer_share"][name] = statistics.median(optimizer) / statistics.median(plain)
        results["iteration_seconds"][name] = {
            "plain_steps": statistics.median(plain),
            "iteration": statistics.median(iteration),
            **{key: statistics.median(p[key] for p in phases) for key in phases[0]},
        }
    meta_seconds = {
        name: statistics.median(sample.phases["seconds_meta"] for sample in samples[name])
        for name in ("grouped", "ungrouped")
    }
    results["grouped_meta"] = {
        "speedup": meta_seconds["ungrouped"] / meta_seconds["grouped"],
        "seconds": meta_seconds,
    }
    write_results(arguments.out, results)
    distributed.shutdown()


if __name__ == "__main__":
    main()
