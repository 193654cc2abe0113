"""Runs variants of one bi-level run under a launcher and saves what each computed.

    torchrun --nproc_per_node W bilevel_worker.py OUT MODEL VARIANTS DEVICE

VARIANTS is JSON: a name to {"flags": [...], "shards": folder, "mutant": name or absent,
"iterations": number or absent}; a mutant is a defect put in on purpose, to see that the comparison
finds it.
"""

import json
import sys
from itertools import islice
from pathlib import Path

import torch

from dreamprm_dist import distributed
from dreamprm_dist.data.shards import ShardFolder
from dreamprm_dist.reweighters import InstanceTable
from dreamprm_dist.training import engine, loader
from dreamprm_dist.training.config import parse_train_config
from dreamprm_dist.training.run import TrainingRun

ITERATIONS = 3
SETTINGS = """
    --precision fp32 --num_workers 0 --lr 1e-4 --scheduler_type constant
    --meta_scheduler_type constant --row_update normalized_sgd --meta_lr 0.2
    --activation_function Project --weight_min 0 --unroll_steps 2 --gradient_clipping 0.5
""".split()


def starting_weights(count: int) -> torch.Tensor:
    """Weights (count,) by sample ID, unlike each other, some 0: no instance is drawn twice here."""
    return torch.arange(count) % 5 / 2


def start_from_them(table: InstanceTable) -> None:
    weights, shards = starting_weights(table.partition.total), table.partition.num_shards
    state = table.state_dict()
    for shard in table.partition.shards:
        state[f"shard-{shard}.0.parameter"] = weights[shard::shards]
    table.load_state_dict(state)


def results(
    out: Path, model: str, shards: Path, device: str, flags: list[str], iterations: int
) -> dict:
    config = parse_train_config(
        [
            *(*SETTINGS, "--device", device),
            *("--reward_model", model, "--weights_path", str(out / "run")),
            *("--iteration_num", str(ITERATIONS), *flags),
        ]
    )
    run = TrainingRun(
        config,
        ShardFolder(shards / "train"),
        ShardFolder(shards / "meta"),
        distributed.initialize(device),
    )
    if isinstance(run.trainer.reweighter, InstanceTable):
        start_from_them(run.trainer.reweighter)
    engine, directions = run.trainer.engine, []
    meta_gradient = engine.meta_gradient

    def recorded(*arguments):
        v, losses = meta_gradient(*arguments)
        directions.append(torch.cat([t.flatten() for t in v.values()]).cpu())
        return v, losses

    engine.meta_gradient = recorded
    metrics = [
        run.metrics(i, run.trainer.iteration(*batches))
        for i, batches in enumerate(islice(run.data(), iterations), start=1)
    ]
    gathered = run.instance_weights()
    v = torch.stack(directions)
    untouched = meta_step_leaves_the_engine_as_it_is(run)
    return {
        "metrics": {
            key: torch.tensor([m[key] for m in metrics], dtype=torch.float64)
            for key in metrics[0]
            if not key.startswith(("seconds", "samples", "peak", "weight_domains"))
        },
        "v": v,
        "weights": None if gathered is None else gathered[1],
        "untouched": untouched,
        "buffers": {n: str(b.dtype) for n, b in run.trainer.engine.module.named_buffers()},
    }


def meta_step_leaves_the_engine_as_it_is(run: TrainingRun) -> bool:
    """Take a meta gradient and, but for `ghost`, which takes it from the lower step, its
    hypergradient; is every bit that ZeRO holds the same?
    """
    trainer = run.trainer
    before = trainer.engine.zero.snapshot()
    window, meta = next(run.data())
    v, _, _ = trainer.meta_gradient(meta)
    if not trainer.ghost:
        trainer.add_hypergradient(window[-1], v)
    after = trainer.engine.zero.snapshot()
    tensors = [
        [*s.parameters, *s.partitions, *(t for state in s.optimizer for t in state.values())]
        for s in (before, after)
    ]
    assert len(tensors[0]) == len(tensors[1]) > 2
    return all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))


def put_in(mutant: str) -> None:
    if mutant == "v_not_averaged":
        true_mean = distributed.all_reduce_mean

        def total(tensors):
            true_mean(tensors)
            torch._foreach_mul_(list(tensors), float(distributed.world_size()))

        engine.distributed.all_reduce_mean = total
    elif mutant == "v_not_reduced":
        engine.distributed.all_reduce_mean = lambda tensors: None
    elif mutant == "swapped_shards":
        true_draws = loader.rank_draws

        def swapped(*arguments, rank, world_size, **order):
            other = world_size - 1 - rank
            return true_draws(*arguments, rank=other, world_size=world_size, **order)

        loader.rank_draws = swapped
    else:
        raise ValueError(mutant)


def main() -> None:
    out, model, device = Path(sys.argv[1]), sys.argv[2], sys.argv[4]
    distributed.initialize(device)
    torch.set_num_threads(1)
    for name, variant in json.loads(sys.argv[3]).items():
        restore = engine.distributed.all_reduce_mean, loader.rank_draws
        if "mutant" in variant:
            put_in(variant["mutant"])
        try:
            result = results(
                out,
                model,
                Path(variant["shards"]),
                device,
                variant["flags"],
                variant.get("iterations", ITERATIONS),
            )
        except ValueError as error:
            result = {"error": str(error)}
        engine.distributed.all_reduce_mean, loader.rank_draws = restore
        if distributed.rank() == 0:
            torch.save(result, out / f"{name}.pt")
    distributed.shutdown()


if __name__ == "__main__":
    main()
