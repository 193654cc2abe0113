"""The chat format of the PRM: a conversation becomes tokens, step positions and step targets.

ChatML as the released checkpoints were trained on; the score of a step is read at the last token
of `<|im_start|>assistant\\n`, where the model is about to say `+` or `-`. Only this file writes the
format's special tokens: text is text, whatever it says.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from dreamprm_dist.data.schema import Turn, parts_around_images, step_counts
from dreamprm_dist.errors import InputError
from dreamprm_dist.prm.solutions import SYSTEM_PROMPT

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
        step_counts: for each step its roll-outs, see `schema.step_counts`.
    """

    input_ids: list[int]
    step_positions: list[int]
    step_targets: list[int]
    step_counts: list[tuple[int, int]]


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


@dataclass(frozen=True)
class _Template:
    """The chat format's own tokens, and how the text between them becomes tokens.

    Attributes:
        turn_start, turn_end, answer, system: token ids of `<|im_start|>`, `<|im_end|>\\n`,
            `<|im_start|>assistant\\n`, and of the PRM's own system prompt behind its role.
        image_start, image_context, image_end: a token id each.
        plain: the tokenizer without its special and other added tokens.
    """

    turn_start: list[int]
    turn_end: list[int]
    answer: list[int]
    system: list[int]
    image_start: int
    image_context: int
    image_end: int
    plain: Tokenizer

    def text(self, text: str) -> list[int]:
        """Token ids of a text, none of them a special token's, though it spells one."""
        return self.plain.encode(text, add_special_tokens=False).ids

    def image(self, num_tokens: int) -> list[int]:
        return [self.image_start, *[self.image_context] * num_tokens, self.image_end]


@lru_cache(maxsize=8)  # as `label_token_ids`
def _template(tokenizer: PreTrainedTokenizerBase) -> _Template:
    """Raises InputError where the tokenizer lacks a token, or cannot be used without them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(
            "the tokenizer has no tokenizer.json, without which text and special tokens cannot be "
            "told apart; give InternVL3's own"
        )
    # The model holds the vocabulary, here too the same one: it takes no memory. It writes text as
    # the tokenizer itself does between two special tokens.
    plain = Tokenizer(backend.model)
    plain.normalizer, plain.pre_tokenizer = backend.normalizer, backend.pre_tokenizer

    vocabulary = tokenizer.get_vocab()

    def special(token: str) -> int:
        if token not in vocabulary:
            raise InputError(f"the tokenizer lacks {token}; give InternVL3's own")
        return vocabulary[token]

    def text(text: str) -> list[int]:
        return plain.encode(text, add_special_tokens=False).ids

    return _Template(
        turn_start=[special(TURN_START)],
        turn_end=[special(TURN_END), *text("\n")],
        answer=[special(TURN_START), *text(f"{ROLES['gpt']}\n")],
        # No one else's text, so that it may be an added token, as the demo's tokenizer has it.
        system=tokenizer.encode(f"{ROLES['system']}\n{SYSTEM_PROMPT}", add_special_tokens=False),
        image_start=special(IMAGE_START),
        image_context=special(IMAGE_CONTEXT),
        image_end=special(IMAGE_END),
        plain=plain,
    )


def encode_conversation(
    conversations: Sequence[Turn],
    tokenizer: PreTrainedTokenizerBase,
    num_tiles: int | Sequence[int],
    tokens_per_tile: int = 256,
    label_context: str = "data",
) -> EncodedConversation:
    """Encode a conversation and find where its steps are scored.

    What a turn says is text and nothing else: it ends no turn, places no image and holds no special
    token. Only in the question `<image>` is where an image stands, see `parts_around_images`.

    Args:
        conversations: the turns; an unlabelled step is `+` in the context and has no target.
        num_tiles: tiles of each image, thumbnails included (an int stands for one image).
        tokens_per_tile: image tokens of one tile.
        label_context: what stands in the context as the answers of earlier steps: `data` the
            given labels, `plus` always `+`, as when candidates are scored.

    Raises:
        InputError: images and `<image>` in the question do not match, or there is no step.
    """
    if label_context not in LABEL_CONTEXTS:
        raise InputError(f"label_context is {label_context!r}; choose from {LABEL_CONTEXTS}")
    tiles = [num_tiles] if isinstance(num_tiles, int) else list(num_tiles)
    label_ids, template = label_token_ids(tokenizer), _template(tokenizer)

    humans = (place for place, turn in enumerate(conversations) if turn["from"] == "human")
    question = next(humans, None)

    input_ids: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    for place, turn in enumerate(conversations):
        if turn["from"] == "gpt":
            label = turn["value"]
            input_ids += template.answer
            positions.append(len(input_ids) - 1)
            targets.append(IGNORE_INDEX if label is None else label_ids[label])
            shown = "+" if label is None or label_context == "plus" else label
            input_ids.append(label_ids[shown])
        elif turn == {"from": "system", "value": SYSTEM_PROMPT}:
            input_ids += template.turn_start + template.system
        else:
            value = turn["value"]
            parts = parts_around_images(value, len(tiles)) if place == question else [value]
            # A role and the text behind it are one piece, as the released checkpoints have it.
            input_ids += template.turn_start + template.text(f"{ROLES[turn['from']]}\n{parts[0]}")
            for count, part in zip(tiles, parts[1:], strict=False):
                input_ids += template.image(tokens_per_tile * count) + template.text(part)
        input_ids += template.turn_end
    if not positions:
        raise InputError("the conversation has no step: no `gpt` turn")
    return EncodedConversation(input_ids, positions, targets, step_counts(conversations))
