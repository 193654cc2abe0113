"""The chat format of the PRM: a conversation becomes tokens, step positions and step targets.

ChatML as the released checkpoints were trained on; the score of a step is read at the last token
of `<|im_start|>assistant\\n`, where the model is about to say `+` or `-`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from dreamprm_dist.data.schema import (
    IMAGE_PLACEHOLDER,
    Turn,
    count_placeholders,
    refuse_reserved_tokens,
    texts_of,
)
from dreamprm_dist.errors import InputError

IMAGE_START, IMAGE_CONTEXT, IMAGE_END = "<img>", "<IMG_CONTEXT>", "</img>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
LABEL_CONTEXTS = ("data", "plus")
IGNORE_INDEX = -100
# For tokenizers that come without one; the PRM itself does not use it.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass
class EncodedConversation:
    """A conversation as the model sees it.

    Attributes:
        input_ids: token ids, length L.
        step_positions: for each step the index into `input_ids` whose logits score it.
        step_targets: for each step the token id of its label, `IGNORE_INDEX` where unlabelled.
    """

    input_ids: list[int]
    step_positions: list[int]
    step_targets: list[int]


@lru_cache(maxsize=8)  # every conversation asks; tokenizers are told apart by identity
def label_token_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The token ids of `+` and `-`; raises InputError where either is not one token."""
    ids = {}
    for label in "+-":
        tokens = tokenizer.encode(label, add_special_tokens=False)
        if len(tokens) != 1:
            raise InputError(
                f"the tokenizer writes the label {label!r} as {len(tokens)} tokens; a PRM needs a "
                "tokenizer in which `+` and `-` are single tokens"
            )
        ids[label] = tokens[0]
    return ids


def encode_conversation(
    conversations: Sequence[Turn],
    tokenizer: PreTrainedTokenizerBase,
    num_tiles: int | Sequence[int],
    tokens_per_tile: int = 256,
    label_context: str = "data",
) -> EncodedConversation:
    """Encode a conversation and find where its steps are scored.

    Args:
        conversations: the turns; an unlabelled step is `+` in the context and has no target.
        num_tiles: tiles of each image, thumbnails included (an int stands for one image).
        tokens_per_tile: image tokens of one tile.
        label_context: what stands in the context as the answers of earlier steps: `data` the
            given labels, `plus` always `+`, as when candidates are scored.

    Raises:
        InputError: images and `<image>` placeholders do not match, the text holds a reserved
            token, or there is no step.
    """
    if label_context not in LABEL_CONTEXTS:
        raise InputError(f"label_context is {label_context!r}; choose from {LABEL_CONTEXTS}")
    tiles = [num_tiles] if isinstance(num_tiles, int) else list(num_tiles)
    label_ids = label_token_ids(tokenizer)
    texts = texts_of(conversations)
    images_placed = count_placeholders(texts, len(tiles)) > 0
    for text in texts:
        refuse_reserved_tokens(text, "a turn's text")
    image_blocks = iter(
        IMAGE_START + IMAGE_CONTEXT * (tokens_per_tile * count) + IMAGE_END for count in tiles
    )

    # Text between two labels is tokenised in one piece, as the reference does; a label and the
    # special tokens around it never merge with their neighbours.
    input_ids: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    pending = ""
    for turn in conversations:
        pending += f"{TURN_START}{ROLES[turn['from']]}\n"
        if turn["from"] == "gpt":
            input_ids += tokenizer.encode(pending, add_special_tokens=False)
            label = turn["value"]
            positions.append(len(input_ids) - 1)
            targets.append(IGNORE_INDEX if label is None else label_ids[label])
            shown = "+" if label is None or label_context == "plus" else label
            input_ids.append(label_ids[shown])
            pending = ""
        else:
            if turn["from"] == "human" and not images_placed:
                pending += "".join(image_blocks)
                images_placed = True
            head, *rest = turn["value"].split(IMAGE_PLACEHOLDER)
            pending += head + "".join(next(image_blocks) + part for part in rest)
        pending += f"{TURN_END}\n"
    input_ids += tokenizer.encode(pending, add_special_tokens=False)
    if not positions:
        raise InputError("the conversation has no step: no `gpt` turn")
    return EncodedConversation(input_ids, positions, targets)
