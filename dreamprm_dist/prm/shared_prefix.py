"""Step logits of solutions that share a beginning: what is the same for all is computed once.

The candidates of a question share its images, the system prompt and the question's text, at 7 tiles
nearly all tokens. The vision tower runs once, the language model once over the shared tokens, and
the rest of all candidates is one batch behind that key-value cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from dreamprm_dist.prm.chat import EncodedConversation
from dreamprm_dist.prm.model import PRM


@torch.no_grad()
def step_logits(
    prm: PRM, conversations: Sequence[EncodedConversation], pixel_values: Tensor
) -> list[Tensor]:
    """Logits at the step positions of each conversation.

    They are those of the plain forward pass but for rounding: sums are taken in another order.

    Args:
        conversations: N conversations that show the same images, each with a step.
        pixel_values: (T, 3, size, size) tiles of the images, on the model's device; T may be 0.

    Returns:
        For each conversation (steps, vocabulary).
    """
    config, device = prm.model.model.config, prm.model.device
    features = None
    if len(pixel_values):
        features = prm.image_features(pixel_values).flatten(0, 1)
    length = shared_length(conversations)
    prefix = conversations[0].input_ids[:length]
    ends = [torch.tensor(c.input_ids[length:]) for c in conversations]
    # Attention is causal: padding on the right changes nothing to its left. Any token will do but
    # an image's; the last one of a conversation is a line's end.
    padding = conversations[0].input_ids[-1]
    rest = nn.utils.rnn.pad_sequence(ends, batch_first=True, padding_value=padding).to(device)

    cache = None
    if length:
        cache = DynamicCache(config=config.text_config)
        shown = prefix.count(config.image_token_id)
        input_ids = torch.tensor([prefix], device=device)
        prm.read(prm.embed(input_ids, None if features is None else features[:shown]), cache)
        cache.batch_repeat_interleave(len(conversations))
        features = None if features is None else features[shown:]
    if features is not None:
        features = features.repeat(len(conversations), 1)
    hidden = prm.read(prm.embed(rest, features), cache)

    rows = [row for row, c in enumerate(conversations) for _ in c.step_positions]
    positions = [position - length for c in conversations for position in c.step_positions]
    logits = prm.model.lm_head(hidden[rows, positions])
    return list(logits.split([len(c.step_positions) for c in conversations]))


def shared_length(conversations: Sequence[EncodedConversation]) -> int:
    """Number of tokens before the first scored position that all conversations begin with."""
    columns = zip(*(c.input_ids for c in conversations), strict=False)
    common = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    return min(common, *(c.step_positions[0] for c in conversations))
