"""What only a GPU can show: CUDA start-up, bf16 under ZeRO-2, flash attention beside SDPA, JVP and
taps."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reweighting import rank_batches
from torch.func import functional_call

from dreamprm_dist.hypergradient.ghost import Ghost
from dreamprm_dist.hypergradient.jvp import jvp
from dreamprm_dist.losses import Observation, instance_losses
from dreamprm_dist.prm.batch import InputFormat
from dreamprm_dist.prm.model import load_prm, load_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
TRAIN = Path(__file__).resolve().parents[2] / "launch" / "train.py"
SIZE = 8


def batch_for(prm, model: Path, shards: Path):
    format = InputFormat(6, prm.tile_size, prm.tokens_per_tile)
    tokenizer = load_tokenizer(str(model))
    return rank_batches(shards, tokenizer, format, SIZE, share_tiles=False)[0][0]


def observer(prm, batch):
    def observe(parameters):
        logits = functional_call(prm, dict(parameters), (batch,)).logits
        losses = instance_losses(logits, batch.step_targets, batch.step_rows, len(batch))
        return Observation(losses, losses.new_zeros(0, 0))

    return observe


def ghost_products(prm, batch, v):
    with Ghost(prm).tapping(batch, v) as tapped:
        losses = instance_losses(prm(batch).logits, batch.step_targets, batch.step_rows, len(batch))
        tapped.weigh_in_backward(losses, torch.ones_like(losses)).mean().backward()
    return tapped.products


def test_cuda_gives_the_cpus_losses_and_products(tiny_prm_dir: Path, tiny_shards: Path):
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    results = []
    for device in (torch.device("cpu"), torch.device("cuda")):
        prm = load_prm(str(tiny_prm_dir), "fp32", device).train()
        batch = batch_for(prm, tiny_prm_dir, tiny_shards / "train").to(device)
        parameters = dict(prm.named_parameters())
        observe = observer(prm, batch)
        losses = observe(parameters).losses
        gradients = torch.autograd.grad(losses.mean(), list(parameters.values()))
        v = dict(zip(parameters, gradients, strict=True))
        with prm.forward_mode():
            products = jvp(observe, parameters, v)[1].losses
        found = losses.detach(), products, ghost_products(prm, batch, v)
        results.append([values.cpu() for values in found])
    for cpu, cuda in zip(*results, strict=True):
        torch.testing.assert_close(cuda, cpu, rtol=1e-3, atol=1e-4)  # float32 sums, other orders
    torch.testing.assert_close(results[1][2], results[1][1], rtol=1e-3, atol=1e-4)


def test_ghost_in_bf16_is_near_its_products_in_fp32(tiny_prm_dir: Path, tiny_shards: Path):
    """At the same rounded parameters and v, with the attention that training has."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    device = torch.device("cuda")
    rounded, exact = (load_prm(str(tiny_prm_dir), p, device).train() for p in ("bf16", "fp32"))
    exact.load_state_dict(rounded.state_dict())
    batch = batch_for(exact, tiny_prm_dir, tiny_shards / "train").to(device)
    parameters = dict(exact.named_parameters())
    losses = observer(exact, batch)(parameters).losses
    gradients = torch.autograd.grad(losses.mean(), list(parameters.values()))
    v = {name: g.bfloat16() for name, g in zip(parameters, gradients, strict=True)}
    truth = ghost_products(exact, batch, {name: t.float() for name, t in v.items()})
    found = ghost_products(rounded, batch, v)
    assert found.dtype == torch.float32
    assert (found - truth).norm() <= 0.02 * truth.norm()
    assert (truth.flip(0) - truth).norm() > 0.1 * truth.norm()  # a permutation would be seen


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="no flash-attn")
def test_flash_attention_agrees_with_sdpa_and_gives_way_to_the_jvp(
    tiny_prm_dir: Path, tiny_shards: Path
):
    device = torch.device("cuda")
    prm = load_prm(str(tiny_prm_dir), "bf16", device).train()
    assert prm.model.config._attn_implementation == "flash_attention_2"
    batch = batch_for(prm, tiny_prm_dir, tiny_shards / "train").to(device)
    parameters = dict(prm.named_parameters())
    observe = observer(prm, batch)
    flash = observe(parameters).losses
    with prm.forward_mode():
        math = observe(parameters).losses
        ones = {n: torch.ones_like(p) for n, p in parameters.items()}
        products = jvp(observe, parameters, ones)[1].losses
    assert prm.model.config._attn_implementation == "flash_attention_2"
    torch.testing.assert_close(flash, math, rtol=0.03, atol=0.03)  # bf16: 8 bits
    assert products.isfinite().all()


@pytest.mark.parametrize(
    "options",
    [
        *(["--strategy", strategy] for strategy in ("zero1", "zero2", "zero2_offload")),
        # Layer norm's statistics are float32 on CUDA: behind a frozen tower a tangent could be too.
        ["--freeze_vision_tower"],
        ["--freeze_vision_tower", "--hypergradient", "sama"],
        ["--gradient_checkpointing"],
        ["--hypergradient", "ghost"],
        ["--hypergradient", "ghost", "--gradient_checkpointing"],
        ["--hypergradient", "ghost", "--precondition", "adam"],
        ["--hypergradient", "ghost", "--unroll_steps", "2", "--unroll_window", "all"],
        ["--precision", "fp32"],
        ["--device", "cpu"],
    ],
    ids=" ".join,
)
def test_a_run_under_deepspeed(
    tmp_path: Path, tiny_prm_dir: Path, tiny_shards: Path, options: list[str]
):
    ranks = max(n for n in (1, 2, 4) if n <= torch.cuda.device_count())  # there are four shards
    launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", ranks]
    flags = [
        *("--train_json_file", tiny_shards / "train", "--meta_json_file", tiny_shards / "meta"),
        *("--reward_model", tiny_prm_dir, "--weights_path", tmp_path, *options),
        *("--batch_size", 4, "--meta_batch_size", 4, "--iteration_num", 5),
    ]
    command = [sys.executable, *launcher, TRAIN, *flags]
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(line["lower_loss"] > 0 and line["meta_gradient_norm"] > 0 for line in lines)
    assert (tmp_path / "export" / "instance_weights.parquet").is_file()


ALONE = """
import torch
from dreamprm_dist import distributed
from dreamprm_dist.errors import InputError

with distributed.joined("cuda") as device:
    one = torch.ones(1, device=device)
    torch.distributed.all_reduce(one)
    if distributed.rank() == 1:
        raise InputError("rank 1 fails alone")
    torch.distributed.all_reduce(one)
"""


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_a_rank_that_fails_alone_says_so_and_ends_the_run(tmp_path: Path):
    (tmp_path / "alone.py").write_text(ALONE)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launcher, str(tmp_path / "alone.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1 and "error: rank 1 fails alone" in done.stderr
