"""The meta gradient of several micro-batches against one sum in float64."""

from pathlib import Path

import pytest
import torch
from reweighting import rank_batches

from dreamprm_dist.losses import MetaLossConfig, meta_losses
from dreamprm_dist.prm.batch import InputFormat
from dreamprm_dist.prm.chat import label_token_ids
from dreamprm_dist.prm.model import load_prm, load_tokenizer
from dreamprm_dist.training.passes import meta_gradient, unalias

COUNT = 6


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_micro_batches_add_up_in_float32(tiny_prm_dir: Path, tiny_shards: Path, precision: str):
    prm = load_prm(str(tiny_prm_dir), precision, torch.device("cpu")).train()
    tokenizer = load_tokenizer(str(tiny_prm_dir))
    label_ids = label_token_ids(tokenizer)
    format = InputFormat(6, prm.tile_size, prm.tokens_per_tile)
    drawn = rank_batches(tiny_shards / "meta", tokenizer, format, 2, level=1)
    batches = [drawn[step][0] for step in range(COUNT)]
    parameters = dict(prm.named_parameters())
    scope = [name for name in parameters if "vision" not in name]

    def loss(output, batch):
        return meta_losses(
            output.logits, batch.step_rows, batch.true_false, label_ids, MetaLossConfig()
        )

    found, losses = meta_gradient(prm, parameters, scope, batches, loss, 0.25)
    parts = [meta_gradient(prm, parameters, scope, [batch], loss, 0.25) for batch in batches]
    assert losses.equal(torch.cat([values for _, values in parts])) and len(losses) == 2 * COUNT
    assert list(found) == scope
    rounded = torch.finfo(next(iter(found.values())).dtype).eps / 2
    for name, v in found.items():
        truth = torch.stack([part[name].double() for part, _ in parts]).sum(0)
        # One rounding of the sum, and float32's own where parts cancel: sums in bf16 have more.
        bound = rounded * truth.abs() + 1e-6 * max(p[name].abs().max() for p, _ in parts)
        assert ((v.double() - truth).abs() <= bound).all(), name


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_gradients_are_apart_and_copied_only_where_they_share_memory(device: str):
    """On the meta device, where runs are planned, no memory has an address."""
    whole, other = torch.zeros(4, device=device), torch.zeros(3, device=device)
    first, second, third = unalias([whole[:2], whole[2:], other])
    storages = {id(t.untyped_storage()) for t in (first, second, third)}
    assert len(storages) == 3
    assert first.untyped_storage() is whole.untyped_storage() and third is other
