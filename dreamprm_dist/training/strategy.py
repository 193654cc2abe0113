"""ZeRO's settings: the JSON of a `--strategy` with what the configuration owns written into it."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import torch

from dreamprm_dist.errors import InputError
from dreamprm_dist.training.config import TrainConfig

DS_CONFIGS = resources.files("dreamprm_dist") / "ds_configs"
if not DS_CONFIGS.is_dir():  # a checkout has it beside the package, where users edit it
    DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"


def resolved_strategy(strategy: str, device: torch.device) -> str:
    """The name of a file in ds_configs/, also for `default`."""
    if strategy == "default":
        return "zero2" if device.type == "cuda" else "zero2_cpu"
    return strategy


def deepspeed_config(
    config: TrainConfig, device: torch.device, largest: int, world_size: int
) -> dict:
    """The JSON of `--strategy` with what the configuration owns written into it.

    Args:
        largest: elements of the largest trained parameter.
        world_size: number of ranks.

    Raises:
        InputError: the JSON sets a value that the configuration owns to something else.
    """
    strategy = resolved_strategy(config.run.strategy, device)
    file = DS_CONFIGS / f"{strategy}.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    zero = settings["zero_optimization"]
    lower, bf16 = config.lower, config.model.precision == "bf16"
    owned = {
        "train_micro_batch_size_per_gpu": lower.batch_size,
        "gradient_accumulation_steps": lower.gradient_accumulation,
        "train_batch_size": lower.batch_size * lower.gradient_accumulation * world_size,
        "gradient_clipping": lower.gradient_clipping,
        "bf16": {"enabled": bf16, "check_grad_overflow": True},
        "fp16": {"enabled": False},
    }
    # Of stage 1 DeepSpeed would make another optimizer, which has no such partitions.
    if bf16 and lower.gradient_accumulation > 1 and zero["stage"] == 2:
        owned["data_types"] = {"grad_accum_dtype": "fp32"}
    for key, value in owned.items():
        if settings.get(key, value) not in (value, "auto"):
            raise InputError(
                f"{file}: {key} is {settings[key]}, but the configuration says {value}; leave it "
                "out of the file"
            )
    for key in ("optimizer", "scheduler"):
        if key in settings:
            raise InputError(f"{file}: {key} belongs to the configuration; leave it out")
    if zero.get("overlap_comm"):
        # The gradient of a parameter that is larger than the bucket DeepSpeed reduces on a stream
        # of its own, and gives its memory away meanwhile.
        zero["reduce_bucket_size"] = max(zero.get("reduce_bucket_size", 0), largest)
    return settings | owned
