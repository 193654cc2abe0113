"""The choice of attention, and one that forward-mode differentiation knows."""

import contextlib
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from transformers import AttentionInterface, Cache, InternVLForConditionalGeneration
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import is_flash_attn_2_available

FLASH, FORWARD_MODE = "flash_attention_2", "forward_mode"
SCORES_BYTES = 256 * 2**20  # weights, their tangents and a temporary are as large again


def attention_implementation(device: torch.device, dtype: torch.dtype) -> str:
    """flash_attention_2 for bf16 on CUDA when flash-attn 2 is installed, else torch's SDPA."""
    # It knows no float32.
    if device.type == "cuda" and dtype == torch.bfloat16 and is_flash_attn_2_available():
        return FLASH
    return "sdpa"


def attention_in_use(model: InternVLForConditionalGeneration) -> str:
    """transformers' name of the attention that the model computes with."""
    return model.config._attn_implementation


def sequence_lengths(
    implementation: str | None, embeddings: Tensor, cache: Cache | None
) -> dict[str, Tensor | int]:
    """Tell flash attention that a batch of one, (1, L, width), is one sequence.

    Else transformers looks for several in the positions, in every layer, and waits for the device
    to show them. In larger batches it looks for none.
    """
    batch, length, _ = embeddings.shape
    # A sliding window's layer keeps fewer keys than the cache has seen.
    if implementation != FLASH or batch > 1 or (cache is not None and any(cache.is_sliding)):
        return {}
    keys = length + (0 if cache is None else cache.get_seq_length())
    ends_q, ends_k = (
        torch.arange(0, n + 1, n, dtype=torch.int32, device=embeddings.device)
        for n in (length, keys)
    )
    return {
        "cu_seq_lens_q": ends_q,
        "cu_seq_lens_k": ends_k,
        "max_length_q": length,
        "max_length_k": keys,
    }


@contextlib.contextmanager
def forward_mode(model: InternVLForConditionalGeneration) -> Iterator[None]:
    """Run a block with attention that has forward-mode tangents, which no flash kernel has.

    There is no backward pass through it.
    """
    before = attention_in_use(model)
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    hooks = [norm.register_forward_hook(_narrow_tangent) for norm in norms]
    model.set_attn_implementation(FORWARD_MODE)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()


def _narrow_tangent(norm: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor | None:
    """The output with its tangent in its own dtype.

    Torch's rule for layer norm gives the tangent the dtype of the statistics, which CUDA keeps in
    float32 for a bf16 output; the next product would refuse it.
    """
    primal, tangent = forward_ad.unpack_dual(output)
    if tangent is None or tangent.dtype == primal.dtype:
        return None
    return forward_ad.make_dual(primal, tangent.to(primal.dtype))


class _Attention(torch.autograd.Function):
    """Softmax attention with its tangent in closed form.

    Torch differentiates the mathematical kernel of its SDPA too, but by a formula for softmax that
    takes its exponentials again and passes over the scores a dozen times: a quarter of the JVP.
    """

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
        """Query (N, P, G, D), scaled; key and value (N, L, D), each for G heads of the query.

        With a window the P positions of the query are the last of the L of the key, and each sees
        as many keys, up to its own; without one all see all.
        """
        scores = query.flatten(1, 2) @ key.mT
        if window is not None:
            positions, length = query.shape[1], key.shape[1]
            first = length - positions
            seen = torch.ones(positions, length, dtype=torch.bool, device=key.device)
            seen = seen.tril(first).triu(first - window + 1)[:, None]
            scores.view(*query.shape[:3], length).masked_fill_(~seen, -torch.inf)
        weights = torch.softmax(scores, -1)
        ctx.save_for_forward(query, key, value, weights)
        return (weights @ value).view_as(query)

    @staticmethod
    def jvp(
        ctx, query_t: Tensor | None, key_t: Tensor | None, value_t: Tensor | None, _: None
    ) -> Tensor:
        """With w = softmax(s) and w' = w (s' - sum(w s')) elementwise: d(w v) = w' v + w v'."""
        query, key, value, weights = ctx.saved_tensors
        scores_t = tangent = None
        if query_t is not None:
            scores_t = query_t.flatten(1, 2) @ key.mT
        if key_t is not None:
            scores_t = _plus_product(scores_t, query.flatten(1, 2), key_t.mT)
        if scores_t is not None:
            scores_t *= weights
            scores_t.addcmul_(weights, scores_t.sum(-1, keepdim=True), value=-1)
            # The sum of w' is 0. Without what all values share, TF32 has nothing large to cancel.
            tangent = scores_t @ (value - value.mean(1, keepdim=True))
        if value_t is not None:
            tangent = _plus_product(tangent, weights, value_t)
        assert tangent is not None  # torch calls this where an input has a tangent
        return tangent.view_as(query)


def _plus_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    return a @ b if total is None else total.baddbmm_(a, b)


def _forward_mode(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query (B, H, L, D), key and value (B, H / G, L, D).

    There is no mask but that of causality and a sliding window: batches are padded on the right.
    bf16 is computed in float32, as by SDPA's mathematical kernel, with TF32's products on CUDA. The
    query's positions are taken in parts whose scores fit into `SCORES_BYTES`. Where nothing moves,
    as in layers outside of `hypergradient_scope`, a flash kernel will do.
    """
    moves = any(forward_ad.unpack_dual(x).tangent is not None for x in (query, key, value))
    if not moves and sliding_window is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal
        )
    (batch, heads, length, width), groups = query.shape, key.shape[1]
    causal = module.is_causal if is_causal is None else is_causal
    dtype = torch.promote_types(query.dtype, torch.float32)
    scaled = (query.to(dtype) * scaling).reshape(-1, heads // groups, length, width).transpose(1, 2)
    key, value = (x.to(dtype).reshape(-1, length, width) for x in (key, value))
    window = (sliding_window or length) if causal else None
    size = max(1, SCORES_BYTES // (batch * heads * length * dtype.itemsize))
    with _tensor_cores(query.device, query.dtype):
        parts = [
            _Attention.apply(scaled[:, start:end], key[:, :seen], value[:, :seen], window)
            for start, end in pairwise([*range(0, length, size), length])
            for seen in [end if causal else length]
        ]
    output = torch.cat(parts, 1).view(batch, groups, length, -1, width).transpose(1, 2)
    return output.reshape(batch, length, heads, width).to(query.dtype), None


@contextlib.contextmanager
def _tensor_cores(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Products of float32 within the block are TF32's, if bf16 on CUDA is computed there.

    TF32 keeps 11 bits of a factor. bf16 has 8, so it fits, and what else is cut is cut less than by
    the rounding to bf16 that follows.
    """
    if device.type != "cuda" or dtype != torch.bfloat16:
        yield
        return
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


AttentionInterface.register(FORWARD_MODE, _forward_mode)
