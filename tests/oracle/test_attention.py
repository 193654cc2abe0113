"""Forward mode: attention's tangent in closed form against torch's own formulas, in float64."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from dreamprm_dist.hypergradient import ESTIMATORS
from dreamprm_dist.planning.workload import Workload
from dreamprm_dist.prm import attention
from dreamprm_dist.prm.attention import FORWARD_MODE
from dreamprm_dist.prm.model import load_shapes
from dreamprm_dist.training.passes import directional_derivative

BATCH, LENGTH, WIDTH = 2, 7, 5
SCALING = 0.3


@pytest.mark.parametrize("moving", ["query", "key", "value", "query key", "query key value"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "key_heads"), [(6, 2), (3, 3)])
def test_values_and_tangents(heads: int, key_heads: int, causal: bool, moving: str) -> None:
    torch.manual_seed(0)
    shapes = {"query": heads, "key": key_heads, "value": key_heads}
    inputs, tangents = (
        {n: torch.randn(BATCH, h, LENGTH, WIDTH, dtype=torch.float64) for n, h in shapes.items()}
        for _ in range(2)
    )
    module = SimpleNamespace(is_causal=causal)
    found = []
    for attend in (
        lambda q, k, v: AttentionInterface()[FORWARD_MODE](module, q, k, v, None, SCALING)[0],
        lambda q, k, v: scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=SCALING, enable_gqa=True
        ).transpose(1, 2),
    ):
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            moved = {n: forward_ad.make_dual(inputs[n], tangents[n]) for n in moving.split()}
            output = attend(*(inputs | moved).values())
            found.append(forward_ad.unpack_dual(output))
    assert found[0].primal.shape == (BATCH, LENGTH, heads, WIDTH)
    # The same sums in another order, of numbers near 1.
    torch.testing.assert_close(found[0].primal, found[1].primal, rtol=0, atol=1e-13)
    torch.testing.assert_close(found[0].tangent, found[1].tangent, rtol=0, atol=1e-13)


def test_a_flash_kernel_does_where_nothing_moves(monkeypatch) -> None:
    monkeypatch.setattr(attention, "_Attention", None)
    query, key, value = (torch.randn(BATCH, h, LENGTH, 8, dtype=torch.float64) for h in (6, 2, 2))
    module = SimpleNamespace(is_causal=True, num_key_value_groups=3)
    with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        found, _ = AttentionInterface()[FORWARD_MODE](module, query, key, value, None, SCALING)
    expected = scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=SCALING, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("scope", ["all", "language_model", "last_1_layers"])
def test_every_tangent_has_the_dtype_of_its_primal(
    tiny_prm_dir: Path, frozen: bool, scope: str
) -> None:
    """In bf16 on the meta device, whose layer norm has float32 statistics, as CUDA's has.

    Torch's rule gives the tangent their dtype, and a product of it with a bf16 matrix fails.
    """
    prm = load_shapes(str(tiny_prm_dir), "bf16").train()
    prm.freeze(frozen, False)
    parameters = dict(prm.named_parameters())
    v = {name: torch.empty_like(parameters[name]) for name in prm.parameters_in(scope)}
    norms = 0

    def check(module: nn.Module, _: tuple, output: object) -> None:
        nonlocal norms
        if isinstance(output, torch.Tensor):
            primal, tangent = forward_ad.unpack_dual(output)
            assert primal.dtype in (torch.bfloat16, torch.float32)
            if tangent is not None:
                assert tangent.dtype == primal.dtype, type(module).__name__
                norms += isinstance(module, nn.LayerNorm)

    with prm.forward_mode():  # whose hooks come first
        for module in prm.modules():
            module.register_forward_hook(check)
        losses = directional_derivative(
            prm,
            ESTIMATORS["jvp"],
            parameters,
            v,
            Workload(tiles=2, text_tokens=9, steps=2).batch(prm, 2),
            lambda output, losses, batch: losses.new_zeros(0, 0),
        )[1].losses
    assert losses.dtype == torch.float32 and losses.shape == (2,)
    of_vision = sum(isinstance(module, nn.LayerNorm) for module in prm.modules())
    moving = of_vision if not frozen else 1  # the projector's
    assert norms == (moving if scope == "all" else 0)
