"""The same run on 1 and 2 ranks, at other micro-batch splits, and without DeepSpeed at all."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bilevel_worker import ITERATIONS

from dreamprm_dist.data.collate import InputFormat
from dreamprm_dist.data.loader import RankBatches
from dreamprm_dist.data.shards import ShardFolder
from dreamprm_dist.losses import instance_losses, meta_losses
from dreamprm_dist.prm.chat import label_token_ids
from dreamprm_dist.prm.model import load_prm, load_tokenizer

# Sums in float32 in another order differ by about 1e-7 relative; AdamW divides by the square root
# of tiny second moments and carries such differences on, and each iteration adds to them. 1e-3
# after 6 lower steps is 30 times what is seen and a hundredth of what any mutant changes.
TOLERANCE = 1e-3
SIZE = 8


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).double().norm() / b.double().norm())


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_prm_dir: Path, tiny_shards: Path) -> dict:
    """What the worker computed, by variant, from one spawn for each world size."""
    out = tmp_path_factory.mktemp("world_sizes")
    variants = {
        1: ["one_rank:8:1", "one_rank_accumulated:2:4"],
        2: [
            "two_ranks:4:1",
            "two_ranks_accumulated:2:2",
            "v_not_averaged:4:1:v_not_averaged",
            "v_not_reduced:4:1:v_not_reduced",
            "swapped_shards:4:1:swapped_shards",
        ],
    }
    worker = Path(__file__).with_name("bilevel_worker.py")
    for world_size, names in variants.items():
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(world_size)]
        command = [sys.executable, *launcher, worker, out, tiny_prm_dir, tiny_shards, *names]
        done = subprocess.run(
            [str(c) for c in command], capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr[-4000:]
    return {path.stem: torch.load(path, weights_only=True) for path in out.glob("*.pt")}


def plain_torch_run(model: Path, shards: Path) -> dict:
    """The run written out in plain PyTorch: dense table, no ranks, one backward an instance."""
    torch.set_num_threads(1)
    prm, tokenizer = load_prm(str(model), "fp32").train(), load_tokenizer(str(model))
    label_ids = label_token_ids(tokenizer)
    parameters = [p for p in prm.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01)
    format = InputFormat(6, prm.tile_size, prm.tokens_per_tile, label_context="data")
    folders = [ShardFolder(shards / kind) for kind in ("train", "meta")]
    lower, meta = (
        RankBatches(folder, tokenizer, format, SIZE, SIZE, 1, level, 0, 1)
        for level, folder in enumerate(folders)
    )
    table = torch.ones(folders[0].num_rows)
    directions, norms, lower_losses, all_meta_losses = [], [], [], []
    for iteration in range(ITERATIONS):
        for step in (2 * iteration, 2 * iteration + 1):
            (batch,) = lower[step]
            losses = instance_losses(prm(batch), batch.step_targets, batch.step_rows, len(batch))
            (table[batch.sample_ids] * losses).sum().div(SIZE).backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, 0.5)
            optimizer.step()
            optimizer.zero_grad()
        lower_losses.append(float(losses.detach().mean()))
        norms.append(float(norm))
        (meta_batch,) = meta[iteration]
        values = meta_losses(
            prm(meta_batch),
            meta_batch.step_rows,
            meta_batch.true_false,
            label_ids,
            "mean",
            "both",
        )
        v = torch.autograd.grad(values.mean(), parameters, materialize_grads=True)
        losses = instance_losses(prm(batch), batch.step_targets, batch.step_rows, len(batch))
        hypergradient = torch.zeros_like(table)
        for sample_id, loss in zip(batch.sample_ids, losses, strict=True):
            gradients = torch.autograd.grad(
                loss, parameters, retain_graph=True, materialize_grads=True
            )
            product = sum((g * d).sum() for g, d in zip(gradients, v, strict=True))
            hypergradient[sample_id] -= product / SIZE
        drawn = batch.sample_ids.unique()
        scale = hypergradient[drawn].abs().mean()
        decay = torch.ones_like(table)
        decay[drawn] = 1 - 0.2 * 1e-3
        table = (table * decay - 0.2 * hypergradient / scale).clamp(0, 3)
        directions.append(torch.cat([t.flatten() for t in v]))
        all_meta_losses.append(float(values.detach().mean()))
    return {
        "v": torch.stack(directions),
        "weights": table,
        "metrics": {
            "gradient_norm": torch.tensor(norms),
            "lower_loss": torch.tensor(lower_losses),
            "meta_loss": torch.tensor(all_meta_losses),
        },
    }


def test_one_rank_is_the_run_in_plain_pytorch(runs, tiny_prm_dir: Path, tiny_shards: Path):
    plain = plain_torch_run(tiny_prm_dir, tiny_shards)
    assert relative(runs["one_rank"]["v"], plain["v"]) < TOLERANCE
    assert relative(runs["one_rank"]["weights"], plain["weights"]) < TOLERANCE
    assert plain["weights"].std() > 0.05
    for name, values in plain["metrics"].items():
        assert relative(runs["one_rank"]["metrics"][name], values) < TOLERANCE, name


@pytest.mark.parametrize("other", ["one_rank_accumulated", "two_ranks", "two_ranks_accumulated"])
def test_the_same_global_batch_gives_the_same_run(runs, other: str):
    one, other = runs["one_rank"], runs[other]
    assert relative(other["v"], one["v"]) < TOLERANCE
    assert relative(other["weights"], one["weights"]) < TOLERANCE
    assert one["metrics"].keys() == other["metrics"].keys()
    for name, values in one["metrics"].items():
        assert relative(other["metrics"][name], values) < TOLERANCE, name


@pytest.mark.parametrize("mutant", ["v_not_averaged", "v_not_reduced"])
def test_a_wrong_all_reduce_is_found(runs, mutant: str):
    assert relative(runs[mutant]["v"], runs["one_rank"]["v"]) > 100 * TOLERANCE


def test_rows_on_the_wrong_rank_are_refused(runs):
    assert "belongs to rank" in runs["swapped_shards"]["error"]
