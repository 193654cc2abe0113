"""Runs with NaN and infinite values on the last rank; saves what each rank then held.

    torchrun --nproc_per_node W skipped_steps_worker.py OUT MODEL SHARDS VARIANTS DEVICE

VARIANTS is JSON: a name to its flags.
"""

import json
import sys
from itertools import islice
from pathlib import Path

import torch

from dreamprm_dist import distributed
from dreamprm_dist.data.shards import ShardFolder
from dreamprm_dist.training import trainer as trainer_module
from dreamprm_dist.training.config import parse_train_config
from dreamprm_dist.training.run import TrainingRun

# What is wrong in each iteration, from the very first step on.
POISONS = ["lower", "meta", "infinite", "none"]
DEVICE = sys.argv[5]
TRUE_LOSSES = trainer_module.instance_losses


def make_run(out: Path, model: str, shards: Path, flags: list[str]) -> TrainingRun:
    settings = f"--precision fp32 --num_workers 0 --device {DEVICE} --scheduler_type constant"
    settings += f" --meta_scheduler_type constant --batch_size 4 --reward_model {model}"
    settings += f" --iteration_num 9 --save_every_iterations 99 --weights_path {out / 'run'}"
    return TrainingRun(
        parse_train_config([*settings.split(), *flags]),
        ShardFolder(shards / "train"),
        ShardFolder(shards / "meta"),
        distributed.initialize(DEVICE),
    )


def is_last_rank() -> bool:
    return distributed.rank() == distributed.world_size() - 1


def infinite_losses(*arguments):
    return TRUE_LOSSES(*arguments) + torch.inf  # its gradient is finite


def results(run: TrainingRun) -> dict:
    trainer = run.trainer

    def state() -> dict[str, torch.Tensor]:
        reweighter = trainer.reweighter.state_dict().items()
        zero = trainer.engine.zero.snapshot()
        moments = [t.flatten() for held in zero.optimizer for t in held.values() if t.dim()]
        tensors = {
            "parameters": torch.cat(
                [p.detach().flatten() for p in trainer.engine.module.parameters()]
            ),
            "raw_weights": torch.cat([t.flatten() for n, t in reweighter if "parameter" in n]),
            "optimizer": torch.cat([*(p.flatten() for p in zero.partitions), *moments]),
        }
        return {name: tensor.cpu() for name, tensor in tensors.items()}

    states, counts = [state()], []
    for iteration, (window, meta) in enumerate(islice(run.data(), len(POISONS)), start=1):
        poison, poisoned = POISONS[iteration - 1], is_last_rank()
        trainer_module.instance_losses = (
            infinite_losses if poisoned and poison == "infinite" else TRUE_LOSSES
        )
        if poisoned and poison in ("lower", "meta"):
            batches = meta if poison == "meta" else window[0]
            batches[0].pixel_values[0] = torch.nan
        metrics = run.metrics(iteration, trainer.iteration(window, meta))
        counts.append(metrics["bad_steps"])
        states.append(state())
    return {"states": states, "counts": counts}


def train_without_end(run: TrainingRun) -> str:
    """Train with an infinite loss on the last rank in every iteration; what it ends with."""
    if is_last_rank():
        trainer_module.instance_losses = infinite_losses
    try:
        run.train()
    except ValueError as error:
        return str(error)
    return "trained to the end"


def main() -> None:
    out, model, shards = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    distributed.initialize(DEVICE)
    torch.set_num_threads(1)
    result = {
        name: results(make_run(out, model, shards, flags))
        for name, flags in json.loads(sys.argv[4]).items()
    }
    endless = make_run(out, model, shards, ["--max_bad_steps", "3"])
    result["message"] = train_without_end(endless)
    torch.save(result, out / f"rank-{distributed.rank()}.pt")
    distributed.shutdown()


if __name__ == "__main__":
    main()
