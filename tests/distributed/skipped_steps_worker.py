"""Runs with NaN and infinite values on rank 1 under a launcher; saves what each rank then held.

    torchrun --nproc_per_node 2 skipped_steps_worker.py OUT MODEL SHARDS VARIANTS

VARIANTS is JSON: a name to its flags.
"""

import json
import sys
from pathlib import Path

import torch

from dreamprm_dist import distributed
from dreamprm_dist.data.shards import ShardFolder
from dreamprm_dist.training import engine
from dreamprm_dist.training.config import parse_train_config
from dreamprm_dist.training.trainer import BilevelTrainer

# What is wrong in each iteration, from the very first step on.
POISONS = ["lower", "meta", "infinite", "none"]
TRUE_LOSSES = engine.instance_losses


def trainer(out: Path, model: str, shards: Path, flags: list[str]) -> BilevelTrainer:
    settings = "--precision fp32 --num_workers 0 --device cpu --scheduler_type constant"
    settings += f" --meta_scheduler_type constant --batch_size 4 --reward_model {model}"
    settings += f" --iteration_num 9 --save_every_iterations 99 --weights_path {out / 'run'}"
    return BilevelTrainer(
        parse_train_config([*settings.split(), *flags]),
        ShardFolder(shards / "train"),
        ShardFolder(shards / "meta"),
        torch.device("cpu"),
    )


def infinite_losses(*arguments):
    return TRUE_LOSSES(*arguments) + torch.inf  # its gradient is finite


def poisoned(stream, level: str):
    """The stream with NaN pixels on rank 1 where it is this level's turn."""
    for poison, micro_batches in zip(POISONS, stream, strict=False):
        if distributed.rank() == 1 and poison == level:
            micro_batches[0].pixel_values[0] = torch.nan
        yield micro_batches


def run(bilevel: BilevelTrainer) -> dict:
    lower = poisoned(bilevel._stream(bilevel.train_batches, len(POISONS)), "lower")
    meta = poisoned(bilevel._stream(bilevel.meta_batches, len(POISONS)), "meta")

    def state() -> dict[str, torch.Tensor]:
        reweighter = bilevel.reweighter.state_dict().items()
        return {
            "parameters": torch.cat(
                [p.detach().flatten() for p in bilevel.engine.module.parameters()]
            ),
            "raw_weights": torch.cat([t.flatten() for n, t in reweighter if "parameter" in n]),
        }

    states, counts = [state()], []
    for iteration, poison in enumerate(POISONS, start=1):
        infinite = poison == "infinite" and distributed.rank() == 1
        engine.instance_losses = infinite_losses if infinite else TRUE_LOSSES
        metrics = bilevel._metrics(iteration, bilevel.iteration(lower, meta))
        counts.append(metrics["bad_steps"])
        states.append(state())
    return {"states": states, "counts": counts}


def run_without_end(bilevel: BilevelTrainer) -> str:
    """Train with an infinite loss on rank 1 in every iteration; what it ends with."""
    if distributed.rank() == 1:
        engine.instance_losses = infinite_losses
    try:
        bilevel.train()
    except ValueError as error:
        return str(error)
    return "trained to the end"


def main() -> None:
    out, model, shards = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    distributed.initialize("cpu")
    torch.set_num_threads(1)
    result = {
        name: run(trainer(out, model, shards, flags))
        for name, flags in json.loads(sys.argv[4]).items()
    }
    endless = trainer(out, model, shards, ["--max_bad_steps", "3"])
    result["message"] = run_without_end(endless)
    torch.save(result, out / f"rank-{distributed.rank()}.pt")
    distributed.shutdown()


if __name__ == "__main__":
    main()
