"""Forward mode: attention's tangent in closed form against torch's own formulas, in float64."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from dreamprm_dist.prm import attention
from dreamprm_dist.prm.attention import FORWARD_MODE
from dreamprm_dist.prm.model import load_prm

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


def test_behind_a_frozen_tower_the_projector_is_given_a_tangent(tiny_prm_dir: Path) -> None:
    """Of zeros: on CUDA torch's rule for layer norm else leaves bf16, which no CPU can show."""
    torch.manual_seed(0)
    prm = load_prm(str(tiny_prm_dir), "fp32").double()
    projector, seen = prm.model.model.multi_modal_projector, []
    features = torch.randn(3, projector.layer_norm.weight.numel(), dtype=torch.float64)
    parameters = {name: p.detach() for name, p in projector.named_parameters()}
    v = {name: torch.randn_like(p) for name, p in parameters.items()}

    def project(parameters: dict) -> torch.Tensor:
        return functional_call(projector, parameters, (features,))

    _, expected = torch.func.jvp(project, (parameters,), (v,))
    projector.layer_norm.register_forward_pre_hook(
        lambda _, inputs: seen.append(forward_ad.unpack_dual(inputs[0]).tangent)
    )
    with torch.no_grad(), prm.forward_mode(), forward_ad.dual_level():
        project(parameters)
        duals = {n: forward_ad.make_dual(p, v[n]) for n, p in parameters.items()}
        tangent = forward_ad.unpack_dual(project(duals)).tangent
    assert seen[0] is None and seen[1].shape == features.shape and not seen[1].any()
    torch.testing.assert_close(tangent, expected, rtol=1e-12, atol=1e-12)
