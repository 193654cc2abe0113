"""Forward mode: attention's tangent in closed form against torch's own formulas, in float64."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface

from dreamprm_dist.hypergradient import ESTIMATORS
from dreamprm_dist.losses import instance_losses
from dreamprm_dist.planning.workload import Workload
from dreamprm_dist.prm import attention
from dreamprm_dist.prm.attention import FORWARD_MODE
from dreamprm_dist.prm.model import load_shapes
from dreamprm_dist.training.passes import directional_derivative

BATCH, LENGTH, WIDTH = 2, 7, 5
SCALING = 0.3
MATMUL = torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def own_precision():
    before = MATMUL.fp32_precision
    yield
    MATMUL.fp32_precision = before


def causal_attention(inputs: list[Tensor], tangents: list[Tensor], scaling: float = SCALING):
    """Causal attention and its tangent."""
    module = SimpleNamespace(is_causal=True)
    with torch.no_grad(), forward_ad.dual_level():
        duals = map(forward_ad.make_dual, inputs, tangents)
        output, _ = AttentionInterface()[FORWARD_MODE](module, *duals, None, scaling)
        return forward_ad.unpack_dual(output)


@pytest.mark.parametrize("moving", ["query", "key", "value", "query key", "query key value"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "key_heads"), [(6, 2), (3, 3)])
@pytest.mark.parametrize("scores_bytes", [attention.SCORES_BYTES, 2100, 1])
def test_values_and_tangents(
    heads: int, key_heads: int, causal: bool, moving: str, scores_bytes: int, monkeypatch
) -> None:
    """Also in parts: of 3, 3, 1 or 6, 1 positions of the query, and of one."""
    monkeypatch.setattr(attention, "SCORES_BYTES", scores_bytes)
    torch.manual_seed(0)
    shapes = {"query": heads, "key": key_heads, "value": key_heads}
    inputs, tangents = (
        {
            n: torch.randn(BATCH, LENGTH, h, WIDTH, dtype=torch.float64).transpose(1, 2)
            for n, h in shapes.items()
        }
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


@pytest.mark.parametrize("moves", [True, False])
@pytest.mark.parametrize("scores_bytes", [attention.SCORES_BYTES, 2100])
def test_a_sliding_window(moves: bool, scores_bytes: int, monkeypatch) -> None:
    """Of three keys; nothing tells transformers to make a mask of it here."""
    monkeypatch.setattr(attention, "SCORES_BYTES", scores_bytes)
    torch.manual_seed(0)
    shapes = [(BATCH, heads, LENGTH, WIDTH) for heads in (6, 2, 2)]
    inputs, tangents = ([torch.randn(s, dtype=torch.float64) for s in shapes] for _ in range(2))
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().triu(-2)
    module = SimpleNamespace(is_causal=True)
    found = []
    for attend in (
        lambda q, k, v: AttentionInterface()[FORWARD_MODE](
            module, q, k, v, None, SCALING, sliding_window=3
        )[0],
        lambda q, k, v: scaled_dot_product_attention(
            q, k, v, seen, scale=SCALING, enable_gqa=True
        ).transpose(1, 2),
    ):
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            duals = list(map(forward_ad.make_dual, inputs, tangents)) if moves else inputs
            found.append(forward_ad.unpack_dual(attend(*duals)))
    torch.testing.assert_close(found[0].primal, found[1].primal, rtol=0, atol=1e-13)
    assert moves == (found[0].tangent is not None)
    if moves:
        torch.testing.assert_close(found[0].tangent, found[1].tangent, rtol=0, atol=1e-13)


class Products(TorchDispatchMode):
    """Batched products as CUDA has them if it heeds `fp32_precision`; notes their sizes in bytes.

    For TF32 the last 13 of a float32's bits are cut off, which is worse than to round them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cut, self.sizes = 0, list[int]()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm_.default):
            *total, a, b = args
            if MATMUL.fp32_precision == "tf32":
                assert a.dtype == b.dtype == torch.float32
                a, b = ((x.contiguous().view(torch.int32) & ~0x1FFF).view(x.dtype) for x in (a, b))
                self.cut += 1
            result = function(*total, a, b, **(kwargs or {}))
            self.sizes.append(result.nbytes)
            return result
        return function(*args, **(kwargs or {}))


def bf16_inputs() -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values share much, as biases have them do: there is something to cancel."""
    torch.manual_seed(0)
    query, *both = (torch.randn(1, heads, 256, 64) for heads in (4, 2, 2))
    key, value = (x + 3 * torch.randn(1, 2, 1, 64) for x in both)
    tangents = [torch.randn_like(x) for x in (query, key, value)]
    tangents[1] += 3 * torch.randn(1, 2, 1, 64)
    inputs, tangents = ([x.bfloat16() for x in each] for each in ((query, key, value), tangents))
    return inputs, tangents


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def test_tf32_is_below_the_rounding_of_the_result_to_bf16(monkeypatch) -> None:
    tensor_cores = attention._tensor_cores
    monkeypatch.setattr(
        attention, "_tensor_cores", lambda _, dtype: tensor_cores(torch.device("cuda"), dtype)
    )
    given = bf16_inputs()
    exact = causal_attention(*([x.double() for x in each] for each in given), scaling=0.125)
    with Products() as products:
        found = causal_attention(*given, scaling=0.125)
    assert products.cut == len(products.sizes) == 6  # two of values, four of tangents
    assert found.primal.dtype == found.tangent.dtype == torch.bfloat16
    for mine, true in zip(found, exact, strict=True):
        # Independent errors add as squares: that of TF32 is at most half of the other's.
        assert error(mine, true) < (1 + 0.5**2) ** 0.5 * error(true.bfloat16(), true)

    float32 = [[x.float() for x in each] for each in given]
    with Products() as products:
        kept = causal_attention(*float32, scaling=0.125)
    assert products.cut == 0 and products.sizes
    for mine, true in zip(kept, exact, strict=True):
        assert error(mine, true) < 1e-6  # float32's 24 bits; TF32 has 1e-3 at best


@pytest.mark.parametrize("before", ["none", "ieee", "tf32"])
def test_tensor_cores_are_left_as_they_were(before: str, monkeypatch) -> None:
    MATMUL.fp32_precision = before
    cpu, cuda, seen = torch.device("cpu"), torch.device("cuda"), []
    for place in ((cpu, torch.bfloat16), (cpu, torch.float32), (cuda, torch.float32)):
        with attention._tensor_cores(*place):
            seen.append(MATMUL.fp32_precision)
    assert seen == [before] * 3
    with attention._tensor_cores(cuda, torch.bfloat16):
        assert MATMUL.fp32_precision == "tf32"
    assert MATMUL.fp32_precision == before
    with pytest.raises(ZeroDivisionError), attention._tensor_cores(cuda, torch.bfloat16):
        1 / 0  # noqa: B018
    assert MATMUL.fp32_precision == before


def test_long_sequences_are_taken_in_parts(monkeypatch) -> None:
    """No more scores at once than `SCORES_BYTES`, and no key that no query of a part may see."""
    inputs, tangents = ([x.float() for x in each] for each in bf16_inputs())
    with Products() as whole:
        expected = causal_attention(inputs, tangents)
    assert max(whole.sizes) == 4 * 256 * 256 * 4  # heads, query, key, bytes
    monkeypatch.setattr(attention, "SCORES_BYTES", 4 * 256 * 4 * 100)
    with Products() as parts:
        found = causal_attention(inputs, tangents)
    scores = [size for size in parts.sizes if size > 4 * 100 * 64 * 4]  # not a product with values
    assert scores == [n for part in (100 * 100, 100 * 200, 56 * 256) for n in [4 * part * 4] * 3]
    for mine, theirs in zip(found, expected, strict=True):
        assert error(mine, theirs.double()) < 1e-6  # float32 sums in another order


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
            lambda output, batch: instance_losses(output.logits, batch),
            lambda output, losses, batch: losses.new_zeros(0, 0),
        )[1].losses
    assert losses.dtype == torch.float32 and losses.shape == (2,)
    of_vision = sum(isinstance(module, nn.LayerNorm) for module in prm.modules())
    moving = of_vision if not frozen else 1  # the projector's
    assert norms == (moving if scope == "all" else 0)
