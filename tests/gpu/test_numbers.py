"""One process: CUDA against the CPU, bf16 against float32, kernels against each other."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from devices import CUDA, DEVICES
from gradient_dot import gradient_dot
from reweighting import rank_batches
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers.utils import is_flash_attn_2_available

from dreamprm_dist.hypergradient.ghost import Ghost
from dreamprm_dist.hypergradient.jvp import jvp
from dreamprm_dist.losses import Observation, instance_losses
from dreamprm_dist.prm.batch import InputFormat, Instance, collate
from dreamprm_dist.prm.chat import encode_conversation
from dreamprm_dist.prm.model import load_prm, load_tokenizer
from dreamprm_dist.prm.shared_prefix import step_logits
from dreamprm_dist.prm.solutions import steps_conversation

SIZE = 4
# bf16 has 8 bits: every rounding is up to 0.4 %. Over a batch 0.2 % is seen of the products, 0.5 %
# of logits; a permuted batch, or another one, differs by a multiple of this.
BF16 = 0.02
# Sums in another order, by kernels that may split a factor into three of TF32; bf16 alone is 2e-3.
FLOAT32 = 5e-4


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """Convolutions take TF32 where nothing else is said, with 11 bits."""
    convolution = torch.backends.cudnn.conv
    before, convolution.fp32_precision = convolution.fp32_precision, "ieee"
    yield
    convolution.fp32_precision = before


def batches_for(prm, model: Path, shards: Path, device: str) -> list:
    """Two batches of training instances."""
    format = InputFormat(6, prm.tile_size, prm.tokens_per_tile)
    tokenizer = load_tokenizer(str(model))
    batches = rank_batches(shards / "train", tokenizer, format, SIZE, share_tiles=False)
    return [batches[step][0].to(torch.device(device)) for step in range(2)]


def losses_of(prm, batch, parameters=None) -> Tensor:
    logits = functional_call(prm, dict(parameters or {}), (batch,), tie_weights=False).logits
    return instance_losses(logits, batch)


def jvp_products(prm, batch, v) -> Tensor:
    def observe(parameters):
        losses = losses_of(prm, batch, parameters)
        return Observation(losses, losses.new_zeros(0, 0))

    with prm.forward_mode():
        named = {n: p for n, p in prm.named_parameters() if p.requires_grad}
        return jvp(observe, *prm.by_use(named, v))[1].losses


def ghost_products(prm, batch, v) -> Tensor:
    with Ghost(prm).tapping(batch, v) as tapped:
        losses = losses_of(prm, batch)
        tapped.weigh_in_backward(losses, torch.ones_like(losses)).mean().backward()
    return tapped.products


def relative(found: Tensor, truth: Tensor) -> float:
    found, truth = found.detach().cpu().double(), truth.detach().cpu().double()
    return float((found - truth).norm() / truth.norm())


@pytest.mark.parametrize("device", [CUDA])
def test_cuda_gives_the_cpus_losses_and_products(
    device: str, wide_prm_dir: Path, tiny_shards: Path
):
    results = []
    for place in ("cpu", device):
        prm = load_prm(str(wide_prm_dir), "fp32", torch.device(place)).train()
        batch, other = batches_for(prm, wide_prm_dir, tiny_shards, place)
        parameters = dict(prm.named_parameters())
        gradients = torch.autograd.grad(losses_of(prm, other).mean(), list(parameters.values()))
        v = dict(zip(parameters, gradients, strict=True))
        found = losses_of(prm, batch).detach(), jvp_products(prm, batch, v)
        results.append((*found, ghost_products(prm, batch, v)))
    for cpu, cuda in zip(*results, strict=True):
        assert relative(cuda, cpu) < FLOAT32
    assert relative(results[1][2], results[1][1]) < FLOAT32


@pytest.mark.parametrize("frozen", [False, True], ids=["all", "frozen_vision_tower"])
@pytest.mark.parametrize("device", DEVICES)
def test_products_in_bf16_are_those_of_reverse_mode(
    device: str, wide_prm_dir: Path, tiny_shards: Path, frozen: bool
):
    """In float32, one backward pass an instance, at the same rounded parameters and v.

    A tangent of another dtype than its primal's would be one that torch rounds, or refuses, later.
    """
    place = torch.device(device)
    rounded, exact = (load_prm(str(wide_prm_dir), p, place).train() for p in ("bf16", "fp32"))
    exact.load_state_dict(rounded.state_dict())
    for prm in (rounded, exact):
        prm.freeze(vision_tower=frozen, language_model=False)
    batch, other = batches_for(exact, wide_prm_dir, tiny_shards, device)
    parameters = {n: p for n, p in exact.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(losses_of(exact, other).mean(), list(parameters.values()))
    v = {n: g.bfloat16() for n, g in zip(parameters, gradients, strict=True)}
    truth = gradient_dot(losses_of(exact, batch), parameters, v)

    kinds = set()

    def note(module, args) -> None:
        for value in args:
            if isinstance(value, Tensor) and value.is_floating_point():
                primal, tangent = forward_ad.unpack_dual(value)
                if tangent is not None:
                    kinds.add((type(module).__name__, primal.dtype, tangent.dtype))

    before = torch.backends.cuda.matmul.fp32_precision
    with register_module_forward_pre_hook(note):
        by_jvp = jvp_products(rounded, batch, v)
    assert torch.backends.cuda.matmul.fp32_precision == before
    assert {kind for kind in kinds if kind[1] != kind[2]} == set()
    moved = {"Linear", "Qwen2RMSNorm"} if frozen else {"Linear", "LayerNorm", "Qwen2RMSNorm"}
    assert moved <= {name for name, *_ in kinds}
    assert by_jvp.dtype == torch.float32
    assert relative(by_jvp, truth) < BF16
    assert relative(ghost_products(rounded, batch, v), truth) < BF16
    assert relative(truth.flip(0), truth) > 5 * BF16


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.skipif(not is_flash_attn_2_available(), reason="no flash-attn")
def test_flash_attention_agrees_with_sdpa_and_gives_way_to_the_jvp(
    device: str, wide_prm_dir: Path, tiny_shards: Path
):
    prm = load_prm(str(wide_prm_dir), "bf16", torch.device(device)).train()
    assert prm.model.config._attn_implementation == "flash_attention_2"
    for batch in batches_for(prm, wide_prm_dir, tiny_shards, device):
        flash = losses_of(prm, batch)
        with prm.forward_mode(), torch.no_grad():
            math = losses_of(prm, batch)
        assert prm.model.config._attn_implementation == "flash_attention_2"
        assert relative(flash, math) < BF16


@pytest.mark.parametrize("device", DEVICES)
def test_behind_a_shared_prefix_logits_are_those_of_the_plain_pass(device: str, wide_prm_dir: Path):
    """Whatever attention a bf16 model has on the device; the truth is in float32."""
    tokenizer, place = load_tokenizer(str(wide_prm_dir)), torch.device(device)
    rounded, exact = (load_prm(str(wide_prm_dir), p, place).eval() for p in ("bf16", "fp32"))
    exact.load_state_dict(rounded.state_dict())
    tiles = torch.randn(3, 3, exact.tile_size, exact.tile_size, device=place)
    solutions = [[f"The digit is {i}.", "It is even."][: 1 + i % 2] for i in range(5)]
    encoded = [
        encode_conversation(
            steps_conversation("Which digit is it?", steps),
            tokenizer,
            [len(tiles)],
            exact.tokens_per_tile,
        )
        for steps in solutions
    ]
    batch = collate([Instance(e, [tiles.cpu()]) for e in encoded], tokenizer.pad_token_id).to(place)
    with torch.no_grad():
        truth, plain = exact(batch).logits, rounded(batch).logits
    behind_prefix = torch.cat(step_logits(rounded, encoded, tiles))
    alone = torch.cat([torch.cat(step_logits(rounded, [one], tiles)) for one in encoded])
    assert relative(plain, truth) < BF16
    assert relative(behind_prefix, truth) < BF16
    assert relative(alone, truth) < BF16
    assert relative(truth.flip(0), truth) > 5 * BF16
