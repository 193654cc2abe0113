"""The PRM: InternVL with logits only where a step is scored."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    Cache,
    InternVLConfig,
    InternVLForConditionalGeneration,
    PreTrainedTokenizerBase,
)

from dreamprm_dist.errors import InputError
from dreamprm_dist.flags import FlagGroup, flag
from dreamprm_dist.prm import layout
from dreamprm_dist.prm.attention import (
    attention_implementation,
    attention_in_use,
    forward_mode,
    sequence_lengths,
)
from dreamprm_dist.prm.batch import Batch
from dreamprm_dist.prm.chat import IMAGE_CONTEXT
from dreamprm_dist.prm.model_folder import CONFIG, fetch_model, read_state, resolve_model

logger = logging.getLogger(__name__)

PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class ModelConfig(FlagGroup):
    """The PRM and how it is held."""

    _argument_group_name: ClassVar[str] = "model"

    reward_model: str = flag(
        "OpenGVLab/InternVL3-1B", "Local folder, run folder or hub name to start from."
    )
    precision: Literal["bf16", "fp32"] = flag("bf16", "Parameters and activations.")
    freeze_vision_tower: bool = flag(False, "Do not train the vision tower.")
    freeze_language_model: bool = flag(False, "Do not train the language model.")
    gradient_checkpointing: bool = flag(False, "Recompute activations to save memory.")


class StepOutput(NamedTuple):
    """The PRM's output at n step positions.

    Attributes:
        logits: (n, vocabulary).
        hidden: (n, hidden size) the last hidden states that the logits were made of.
    """

    logits: Tensor
    hidden: Tensor


class PRM(nn.Module):
    """InternVL as a process reward model.

    `forward` returns logits at the step positions alone: hidden states are gathered before the
    language-model head, so nothing of size sequence x vocabulary is ever made.
    """

    def __init__(self, model: InternVLForConditionalGeneration):
        super().__init__()
        self.model = model
        self._sees_images = True

    @property
    def tile_size(self) -> int:
        """Side of an image tile in pixels."""
        return self.model.model.vision_tower.config.image_size[0]

    @property
    def tokens_per_tile(self) -> int:
        return self.model.config.image_seq_length

    @property
    def max_length(self) -> int:
        """Context length in tokens."""
        return self.model.model.language_model.config.max_position_embeddings

    @property
    def hidden_size(self) -> int:
        """Width of the last hidden states."""
        return self.model.model.language_model.config.hidden_size

    def forward(self, batch: Batch) -> StepOutput:
        """Logits and hidden states at the batch's n step positions."""
        if batch.pixel_values is not None:
            features = self.image_features(batch.pixel_values)[batch.shown_tiles]
            embeddings = self.embed(batch.input_ids, features.flatten(0, 1))
        elif self.training and self._sees_images and torch.is_grad_enabled():
            # ZeRO adds up the ranks' gradients in the order in which they appear. Here all must
            # appear, and as with images: what is computed last is differentiated first, so the
            # embeddings come after the features of an image, here a blank one.
            blank = self._blank_image_features().sum()
            embeddings = self.embed(batch.input_ids) + 0.0 * blank
        else:
            embeddings = self.embed(batch.input_ids)
        hidden = self.read(embeddings)
        hidden = hidden[batch.step_rows, batch.step_positions]
        return StepOutput(self.model.lm_head(hidden), hidden)

    def image_features(self, tiles: Tensor) -> Tensor:
        """Tiles (T, 3, size, size) to what the language model sees of them: (T, tokens, width)."""
        return self.model.get_image_features(tiles).pooler_output

    def embed(self, input_ids: Tensor, features: Tensor | None = None) -> Tensor:
        """Embeddings (B, L, width) of tokens (B, L).

        Args:
            features: (image tokens, width) what stands at the image tokens, in their order.
        """
        embeddings = self.model.get_input_embeddings()(input_ids)
        if features is None:
            return embeddings
        mask = (input_ids == self.model.config.image_token_id)[..., None]
        return embeddings.masked_scatter(mask, features.to(embeddings.dtype))

    def read(self, embeddings: Tensor, cache: Cache | None = None) -> Tensor:
        """Last hidden states (B, L, width) of embeddings (B, L, width).

        Args:
            cache: keys and values of what stands before them, to which theirs are added.
        """
        language_model, mask = self.model.model.language_model, None
        lengths = sequence_lengths(attention_in_use(self.model), embeddings, cache)
        layer_types = set(getattr(language_model.config, "layer_types", ()))
        if cache is None and layer_types == {"full_attention"}:
            # There is none but the causal one. Else transformers looks at the positions for packed
            # sequences, and waits for the device.
            mask = {"full_attention": None}
        return language_model(
            inputs_embeds=embeddings,
            attention_mask=mask,
            cache=cache,
            use_cache=cache is not None,
            **lengths,
        ).last_hidden_state

    def _blank_image_features(self) -> Tensor:
        tile = torch.zeros(1, 3, self.tile_size, self.tile_size, device=self.model.device)
        return self.image_features(tile)

    def forward_mode(self) -> contextlib.AbstractContextManager[None]:
        """Run a block as forward-mode differentiation needs it: with no flash kernel, for one."""
        return forward_mode(self.model)

    def freeze(self, vision_tower: bool, language_model: bool) -> None:
        """Choose what is trained; the projector between the two always is."""
        self.model.model.vision_tower.requires_grad_(not vision_tower)
        self.model.model.language_model.requires_grad_(not language_model)
        self.model.lm_head.requires_grad_(not language_model)

    def see_no_images(self) -> None:
        """Say that no batch of any rank will have an image: then none stands in for them.

        The vision tower and the projector do not run, and their gradients are 0.

        Raises:
            InputError: nothing but these two is trained.
        """
        language = self.model.model.language_model, self.model.lm_head
        if not any(p.requires_grad for part in language for p in part.parameters()):
            raise InputError(
                "no record has an image, and the language model is frozen: nothing can be learned; "
                "train it, or take records with images"
            )
        self._sees_images = False

    def parameters_in(self, scope: str) -> list[str]:
        """Names of the trained parameters that a `hypergradient_scope` covers.

        Raises:
            InputError: the language model has fewer layers, or all of the scope is frozen.
        """
        names = [name for name, p in self.named_parameters() if p.requires_grad]
        if scope == "all":
            return names
        language = "model.model.language_model."
        prefixes: tuple[str, ...] = (language, "model.lm_head.")
        if scope != "language_model":
            wanted = int(scope.removeprefix("last_").removesuffix("_layers"))
            layers = len(self.model.model.language_model.layers)
            if wanted > layers:
                raise InputError(f"hypergradient_scope {scope}: the model has {layers} layers")
            last = range(layers - wanted, layers)
            prefixes = (f"{language}norm.", "model.lm_head.")
            prefixes += tuple(f"{language}layers.{layer}." for layer in last)
        names = [name for name in names if name.startswith(prefixes)]
        if not names:
            raise InputError(f"hypergradient_scope {scope}: all of its parameters are frozen")
        return names

    def by_use(
        self, parameters: Mapping[str, Tensor], v: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Some parameters and v by their uses: a matrix that is embedding and head has two.

        In its use as an embedding v is 0 at the row of padding, to which autograd gives no
        gradient; forward mode and finite differences would move it.
        """
        first = {p: name for name, p in self.named_parameters()}
        used, moved = {}, {}
        for use, p in self.named_parameters(remove_duplicate=False):
            owner = self.get_submodule(use.rpartition(".")[0])
            if first[p] in parameters:
                used[use] = parameters[first[p]]
            if first[p] in v:
                moved[use] = v[first[p]]
                if isinstance(owner, nn.Embedding) and owner.padding_idx is not None:
                    moved[use] = moved[use].clone()
                    moved[use][owner.padding_idx] = 0
        return used, moved

    def instances_of_rows(self, batch: Batch) -> dict[str, Tensor]:
        """The instance that each row of a module's tensors belongs to, by prefix of its name.

        The first dimension is that of tiles, which no two instances may share, of instances, or of
        steps.
        """
        device = batch.input_ids.device
        # Where there are none, the rows are those of the blank tile, if that is shown.
        tiles = torch.zeros(1, dtype=torch.long, device=device)
        if batch.pixel_values is not None:
            assert batch.tile_rows is not None
            tiles = batch.tile_rows
        return {
            "model.model.vision_tower.": tiles,
            "model.model.multi_modal_projector.": tiles,
            "model.model.language_model.": torch.arange(len(batch), device=device),
            "model.lm_head.": batch.step_rows,
        }

    def example_batch(self) -> Batch:
        """Noise: two instances with three tiles and four steps between them."""
        device, image_token = self.model.device, self.model.config.image_token_id
        text = [token for token in range(5) if token != image_token][:4]
        tile = [image_token] * self.tokens_per_tile
        input_ids = [tile + text + tile, tile + text + text[:1] * len(tile)]
        tiles = torch.randn(3, 3, self.tile_size, self.tile_size, device=device)
        steps = torch.tensor([0, 0, 0, 1], device=device)
        return Batch(
            input_ids=torch.tensor(input_ids, device=device),
            pixel_values=tiles,
            shown_tiles=torch.arange(3, device=device),
            tile_rows=torch.tensor([0, 0, 1], device=device),
            step_rows=steps,
            step_positions=len(tile) + torch.arange(4, device=device),
            step_targets=steps,
            step_counts=torch.zeros(4, 2, dtype=torch.long, device=device),
            sample_ids=torch.arange(2),
            true_false=torch.zeros(2, device=device),
        )

    def checkpoint_activations(self) -> None:
        """Recompute activations in backward passes.

        Non-reentrant: reentrant checkpointing returns wrong forward-mode tangents silently.
        """
        self.model.gradient_checkpointing_enable({"use_reentrant": False})


def load_prm(name_or_path: str, precision: str = "bf16", device: torch.device | None = None) -> PRM:
    """Load a PRM from a local folder or the hub, weights from safetensors only, no remote code.

    A run folder stands for its export. Both layouts are read: transformers' own
    (`InternVLForConditionalGeneration`) and the original one (`InternVLChatModel`).

    Raises:
        InputError: it is no InternVL checkpoint, or tensors are missing, left over or misshapen.
    """
    folder = fetch_model(name_or_path, weights=True)
    if (name := resolve_model(name_or_path)) != name_or_path:
        logger.info("%s is a run; the model is its export, %s", name_or_path, name)
    config_dict = _read_config(folder, name)
    original = config_dict["model_type"] == layout.MODEL_TYPE
    vocabulary = load_tokenizer(name).get_vocab() if original else {}
    device = device or torch.device("cpu")
    # Annotated as if it never gave the loading info too.
    load: Any = InternVLForConditionalGeneration.from_pretrained
    try:
        state = read_state(folder)
        if original:
            if (image_token_id := vocabulary.get(IMAGE_CONTEXT)) is None:
                raise InputError(f"its tokenizer lacks {IMAGE_CONTEXT}; give InternVL3's own")
            config = layout.from_original_config(config_dict, image_token_id)
            state = layout.from_original_state(state, config.tie_word_embeddings)
        else:
            config = InternVLConfig.from_dict(config_dict)
        model, info = load(
            None,
            config=config,
            state_dict=state,
            dtype=PRECISIONS[precision],
            attn_implementation=attention_implementation(device, PRECISIONS[precision]),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `_check_tensors` refuses them, with their names
        )
        _check_tensors(info)
        # transformers leaves a head of its own apart whatever the config says, which an export
        # would believe.
        head, embeddings = model.lm_head.weight, model.get_input_embeddings().weight
        model.config.tie_word_embeddings = head is embeddings
    except InputError as error:
        raise InputError(f"model {name}: {error}") from error
    except StrictDataclassError as error:  # a value of another type, which transformers refuses
        raise InputError(f"model {name}: its config.json is wrong ({_short(error)})") from error
    except (ValueError, RuntimeError) as error:
        raise InputError(f"model {name}: {_short(error)}") from error
    _remove_dropout(model)
    return PRM(model).to(device)


def load_shapes(name_or_path: str, precision: str = "bf16") -> PRM:
    """A PRM on the meta device, of its config alone: all shapes, no tensors.

    Raises:
        InputError: as `load_prm`, of the config.
    """
    folder, name = fetch_model(name_or_path), resolve_model(name_or_path)
    config_dict = _read_config(folder, name)
    try:
        if config_dict["model_type"] == layout.MODEL_TYPE:
            config = layout.from_original_config(config_dict, image_token_id=0)
        else:
            config = InternVLConfig.from_dict(config_dict)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(
                config, dtype=PRECISIONS[precision], attn_implementation="sdpa"
            )
    except (InputError, ValueError, RuntimeError, StrictDataclassError) as error:
        raise InputError(f"model {name}: {_short(error)}") from error
    _remove_dropout(model)
    return PRM(model)


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer; a missing padding token becomes the end-of-text token."""
    folder = fetch_model(name_or_path)
    _read_config(folder, name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise InputError(
            f"model {name_or_path}: its tokenizer cannot be read ({_short(error)}); copy the "
            "tokenizer files of the model that it was trained from into its folder"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _read_config(folder: Path, name: str) -> dict:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        model_type = config.get("model_type")
    except (ValueError, AttributeError) as error:
        raise InputError(f"model {name}: its config.json is no JSON object ({error})") from error
    if model_type not in (InternVLConfig.model_type, layout.MODEL_TYPE):
        raise InputError(
            f"model {name}: its config.json says model_type {model_type!r}; give an InternVL3 "
            f"checkpoint, whose model_type is {InternVLConfig.model_type!r} or "
            f"{layout.MODEL_TYPE!r}"
        )
    return config


def _short(error: Exception, length: int = 200) -> str:
    """What another library says, on one line: some of it lists all that would have been right."""
    text = " ".join(str(error).split())
    return text if len(text) <= length else text[:length] + "…"


def _check_tensors(info: dict) -> None:
    """Every parameter must come from the checkpoint, and every tensor of it must be used."""
    found = {
        "missing": sorted(info["missing_keys"]),
        "left over": sorted(info["unexpected_keys"]),
        "of another shape": sorted(name for name, *_ in info["mismatched_keys"]),
    }
    if wrong := [f"{what}: {', '.join(names)}" for what, names in found.items() if names]:
        raise InputError(f"its tensors are not those of its config; {'; '.join(wrong)}")


def _remove_dropout(model: nn.Module) -> None:
    # The hypergradient differentiates the loss again at the same point: both passes must be the
    # same function.
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            vars(module)["attention_dropout"] = 0.0  # torch types unknown attributes as tensors
