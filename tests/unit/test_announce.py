"""What a run says at its start."""

from pathlib import Path

import pytest

from dreamprm_dist.data.shards import ShardFolder
from dreamprm_dist.training.announce import Setting, start_text
from dreamprm_dist.training.config import parse_train_config


def test_a_start_says_what_the_run_stands_on(tiny_shards: Path):
    config = parse_train_config(
        [
            *("--batch_size", "2", "--gradient_accumulation", "4", "--iteration_num", "10"),
            *("--meta_batch_size", "3", "--weights_path", "run"),
        ]
    )
    setting = Setting(
        ranks=8,
        device="NVIDIA H100 80GB HBM3",
        attention="flash_attention_2",
        strategy="zero2",
        trained=632_000_000,
        parameters=938_158_976,
        versions={"torch": "2.13.0", "deepspeed": "0.19.8", "flash-attn": "2.8.3"},
    )
    train, meta = (ShardFolder(tiny_shards / kind) for kind in ("train", "meta"))
    rows = train.num_rows
    said = start_text(config, train, meta, rows, setting).split("\n")
    assert "train the PRM too" not in said[0]
    joined = start_text(config, train, meta, rows + meta.num_rows, setting).split("\n")
    assert joined[0] == f"{said[0]}, {meta.num_rows} of which train the PRM too"
    epochs = [float(text[3].split(" = ")[1].split()[0]) for text in (said, joined)]
    share = (rows + meta.num_rows) / rows
    assert epochs[0] / epochs[1] == pytest.approx(share, rel=1e-2)  # printed with three digits
    assert said[1:3] == [
        "global batch 64 = 8 rank(s) x batch_size 2 x gradient_accumulation 4",
        "meta batch 24 = 8 rank(s) x meta_batch_size 3 x meta_gradient_accumulation 1",
    ]
    assert said[4:] == [
        "on NVIDIA H100 80GB HBM3: precision bf16, attention flash_attention_2, strategy zero2, "
        "632,000,000 of 938,158,976 parameters trained",
        "torch 2.13.0, deepspeed 0.19.8, flash-attn 2.8.3",
    ]
