"""Flash attention as the PRM calls it: the kernel is written out, the rest is transformers'."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, Qwen2Config

from dreamprm_dist.prm import attention
from dreamprm_dist.prm.batch import Batch
from dreamprm_dist.prm.chat import EncodedConversation
from dreamprm_dist.prm.model import PRM, load_prm
from dreamprm_dist.prm.shared_prefix import shared_length, step_logits

# (queries, keys) of each sequence, or None where all are of the tensor's length.
Lengths = tuple[list[int], list[int]] | None


class Kernel:
    """flash-attn's two functions, for one sequence or equal ones; notes what it is told."""

    def __init__(self) -> None:
        self.told: list[Lengths] = []

    def dense(
        self, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool, **_: object
    ) -> Tensor:
        self.told.append(None)
        return self._attend(q, k, v, softmax_scale, causal)

    def varlen(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
    ) -> Tensor:
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert (type(max_seqlen_q), type(max_seqlen_k)) == (int, int)
        assert (max_seqlen_q, max_seqlen_k) == (len(q), len(k))
        assert softmax_scale and not dropout_p
        with torch._C._DisableTorchDispatch():  # its reading is the test's own
            self.told.append((cu_seqlens_q.tolist(), cu_seqlens_k.tolist()))
        return self._attend(q[None], k[None], v[None], softmax_scale, causal)[0]

    @staticmethod
    def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
        """(B, L, H, D); if causal, the queries are the last of the keys, as since version 2.1."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        queries, keys = q.shape[2], k.shape[2]
        seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries) if causal else None
        output = scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=True)
        return output.transpose(1, 2)


class Waits(TorchDispatchMode):
    """Counts how often the host asks a tensor for a number, for which it waits on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def prm(tiny_prm_dir: Path) -> PRM:
    """In float64, and with larger weights: attention must count."""
    prm = load_prm(str(tiny_prm_dir), "fp32").double().eval()
    torch.manual_seed(0)
    for parameter in prm.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5)
    return prm


@pytest.fixture
def kernel(prm: PRM, monkeypatch) -> Iterator[Kernel]:
    """In place of flash-attn, which needs CUDA; the PRM uses it where a test asks for it."""
    kernel = Kernel()
    functions = kernel.dense, kernel.varlen, None, None, None
    processes = flash._lazy_define_process_function(kernel.varlen), None
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda _: (functions, processes))
    yield kernel
    prm.model.config._attn_implementation = "sdpa"


def use_flash(prm: PRM) -> None:
    prm.model.config._attn_implementation = attention.FLASH  # the setter asks for no package


def layers(prm: PRM) -> tuple[int, int]:
    network = prm.model.model
    return len(network.vision_tower.encoder.layer), len(network.language_model.layers)


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 2])
def test_the_forward_pass_is_that_of_sdpa(prm: PRM, kernel: Kernel, size: int) -> None:
    """A batch of one is said to be one sequence; larger ones are what they were, equally long."""
    whole = prm.example_batch()
    batch = whole if size == 2 else first_instance(whole)
    with Waits() as expected_waits:
        expected = prm(batch).logits
    use_flash(prm)
    with Waits() as waits:
        found = prm(batch).logits
    length = batch.input_ids.shape[1]
    one: Lengths = ([0, length], [0, length])
    vision, language = layers(prm)
    assert kernel.told == [None] * vision + [one if size == 1 else None] * language
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)  # float64, in other orders
    # Once where the mask is made, and in no layer.
    assert waits.count == expected_waits.count <= 1


def first_instance(batch: Batch) -> Batch:
    tiles, steps = batch.tile_rows == 0, batch.step_rows == 0
    return replace(
        batch,
        input_ids=batch.input_ids[:1],
        pixel_values=batch.pixel_values[tiles],
        shown_tiles=batch.shown_tiles[tiles],
        tile_rows=batch.tile_rows[tiles],
        step_rows=batch.step_rows[steps],
        step_positions=batch.step_positions[steps],
        step_targets=batch.step_targets[steps],
        step_counts=batch.step_counts[steps],
    )


@pytest.mark.parametrize("ends", [[[1, 2, 3]], [[1, 2, 3], [3, 2]], [[4, 1], [4, 2, 3]]])
def test_scores_behind_a_cache_are_those_of_sdpa(prm: PRM, kernel: Kernel, ends: list) -> None:
    """The shared tokens are one sequence, and what follows is one if there is one conversation."""
    torch.manual_seed(1)
    pixels = torch.randn(1, 3, prm.tile_size, prm.tile_size)
    start = [prm.model.config.image_token_id] * prm.tokens_per_tile + [0, 1]
    conversations = [
        EncodedConversation(start + end, [len(start + end) - 1], [0], [(0, 0)]) for end in ends
    ]
    with Waits() as expected_waits:
        expected = step_logits(prm, conversations, pixels)
    use_flash(prm)
    with Waits() as waits:
        found = step_logits(prm, conversations, pixels)
    shared, longest = shared_length(conversations), max(len(c.input_ids) for c in conversations)
    prefix: Lengths = ([0, shared], [0, shared])
    rest: Lengths = ([0, longest - shared], [0, longest])
    vision, language = layers(prm)
    assert kernel.told == (
        [None] * vision + [prefix] * language + [rest if len(ends) == 1 else None] * language
    )
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    assert waits.count == expected_waits.count == 0


def test_a_cache_that_forgets_is_left_to_transformers() -> None:
    """Of a sliding window's layer the number of keys is not what has been read."""
    config = Qwen2Config(
        num_hidden_layers=2, use_sliding_window=True, sliding_window=4, max_window_layers=1
    )
    embeddings = torch.zeros(1, 3, 8)
    assert (
        attention.sequence_lengths(attention.FLASH, embeddings, DynamicCache(config=config)) == {}
    )
    assert attention.sequence_lengths("sdpa", embeddings, None) == {}
    assert attention.sequence_lengths(attention.FLASH, embeddings, None)["max_length_k"] == 3


@pytest.mark.parametrize("installed", [True, False])
def test_it_is_chosen_for_bf16_on_cuda_where_it_is_installed(installed: bool, monkeypatch) -> None:
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: installed)
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    for device, dtype in ((cuda, torch.float32), (cpu, torch.bfloat16), (cpu, torch.float32)):
        assert attention.attention_implementation(device, dtype) == "sdpa"
    chosen = attention.attention_implementation(cuda, torch.bfloat16)
    assert chosen == ("flash_attention_2" if installed else "sdpa")
