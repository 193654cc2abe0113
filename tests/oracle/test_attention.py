"""Attention with tangents in closed form against torch's own formulas for it, in float64."""

from types import SimpleNamespace

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from dreamprm_dist.prm.attention import FORWARD_MODE

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
    for attention in (
        lambda q, k, v: AttentionInterface()[FORWARD_MODE](module, q, k, v, None, SCALING)[0],
        lambda q, k, v: scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=SCALING, enable_gqa=True
        ).transpose(1, 2),
    ):
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            moved = {n: forward_ad.make_dual(inputs[n], tangents[n]) for n in moving.split()}
            output = attention(*(inputs | moved).values())
            found.append(forward_ad.unpack_dual(output))
    assert found[0].primal.shape == (BATCH, LENGTH, heads, WIDTH)
    # The same sums in another order, of numbers near 1.
    torch.testing.assert_close(found[0].primal, found[1].primal, rtol=0, atol=1e-13)
    torch.testing.assert_close(found[0].tangent, found[1].tangent, rtol=0, atol=1e-13)
