"""The original InternVL3 layout (`InternVLChatModel`), read and written without its remote code.

OpenGVLab/InternVL3-1B and the released DreamPRM-1.5 checkpoints come in it. Their config and the
names of their tensors are mapped to transformers' own InternVL classes and back; nothing is
computed, but the vision tower's fused query, key and value matrices are split and joined.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import InternVLConfig, InternVLVisionConfig, Qwen2Config, Qwen3Config

from dreamprm_dist.errors import InputError

MODEL_TYPE = "internvl_chat"
_SOURCE = "OpenGVLab/InternVL3-1B"  # whose code an exported config names, for who runs such code

# Original prefix -> transformers' prefix; the rest of a name stays, but in the vision blocks.
_PREFIXES = {
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "model.language_model.",
    "mlp1.0.": "model.multi_modal_projector.layer_norm.",
    "mlp1.1.": "model.multi_modal_projector.linear_1.",
    "mlp1.3.": "model.multi_modal_projector.linear_2.",
    "vision_model.embeddings.class_embedding": "model.vision_tower.embeddings.cls_token",
    "vision_model.embeddings.patch_embedding.": (
        "model.vision_tower.embeddings.patch_embeddings.projection."
    ),
    "vision_model.embeddings.position_embedding": (
        "model.vision_tower.embeddings.position_embeddings"
    ),
    "vision_model.encoder.layers.": "model.vision_tower.encoder.layer.",
}
_BLOCKS = "vision_model.encoder.layers."
_BLOCK_PARTS = {
    "attn.proj.": "attention.projection_layer.",
    "attn.q_norm.": "attention.q_norm.",
    "attn.k_norm.": "attention.k_norm.",
    "mlp.": "mlp.",
    "norm1.": "layernorm_before.",
    "norm2.": "layernorm_after.",
    "ls1": "lambda_1",
    "ls2": "lambda_2",
}
_FUSED = "attn.qkv."
_SPLIT = tuple(f"attention.{part}_proj." for part in "qkv")

# Original vision setting -> transformers'. What is not here has no part in the function computed.
_VISION = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "hidden_act": "hidden_act",
    "layer_norm_eps": "layer_norm_eps",
    "norm_type": "norm_type",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "num_channels": "num_channels",
    "qkv_bias": "attention_bias",
    "qk_normalization": "use_qk_norm",
}
# Language models whose tensors have the same names in both layouts, by model_type; Qwen2 is that of
# InternVL3, Qwen3 that of the dense InternVL3.5 models.
_TEXT = {"qwen2": Qwen2Config, "qwen3": Qwen3Config}
_ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# What a config says of a model in training, of generation, and of the file itself.
_NO_PART = {
    *("dtype", "transformers_version", "architectures", "_name_or_path", "use_cache"),
    *("initializer_range", "initializer_factor", "layer_scale_init_value", "attention_dropout"),
    *("hidden_dropout_prob", "projection_dropout", "bos_token_id", "eos_token_id", "pad_token_id"),
    *("use_mean_pooling", "max_window_layers", "image_token_id", "tie_word_embeddings"),
}
_ONLY = "only Qwen2, as in InternVL3, and Qwen3, as in InternVL3.5,"
# What the original says where the mapping supposes it; any other value is another model.
_REQUIRED = {"ps_version": "v2", "select_layer": -1, "use_backbone_lora": 0, "use_llm_lora": 0}


def from_original_config(original: Mapping, image_token_id: int) -> InternVLConfig:
    """transformers' config of a checkpoint in the original layout.

    Args:
        original: what its `config.json` holds.
        image_token_id: id of `<IMG_CONTEXT>`, which the original leaves to the tokenizer.

    Raises:
        InputError: a setting that the mapping cannot express, or one that is missing.
    """
    for name, value in _REQUIRED.items():
        if (found := original.get(name, value)) != value:
            raise InputError(f"its config.json says {name} {found!r}; only {value!r} can be loaded")
    vision, text = original.get("vision_config"), original.get("llm_config")
    if not isinstance(vision, dict) or not isinstance(text, dict):
        raise InputError("its config.json has no vision_config and llm_config")
    architecture = (text.get("architectures") or ["unnamed"])[0]
    names = {architecture: model_type for model_type, architecture in _ARCHITECTURES.items()}
    language_model = text.get("model_type") or names.get(architecture, architecture)
    if language_model not in _TEXT:
        raise InputError(f"its language model is {language_model!r}; {_ONLY} can be loaded")
    text_config = _TEXT[language_model]
    if missing := sorted({"hidden_size", "num_hidden_layers", "num_attention_heads"} - {*vision}):
        raise InputError(f"its vision_config lacks {', '.join(missing)}")
    tile_size = original.get("force_image_size") or vision.get("image_size", 448)
    if vision.get("image_size", tile_size) != tile_size:
        raise InputError(
            f"its force_image_size is {tile_size}, but its position embeddings are those of "
            f"{vision['image_size']} pixels"
        )
    ratio = original.get("downsample_ratio", 0.5)
    known = {field.name for field in dataclasses.fields(text_config)}
    settings = {name: text[name] for name in text if name in known | {"rope_theta"}}
    if isinstance(rope := text.get("rope_scaling"), Mapping):
        # transformers 4 said "type" too, or nothing else; transformers adds to the mapping it gets.
        settings["rope_scaling"] = {"rope_type" if k == "type" else k: v for k, v in rope.items()}
    return InternVLConfig(
        vision_config=InternVLVisionConfig(
            **{ours: vision[theirs] for theirs, ours in _VISION.items() if theirs in vision}
        ),
        text_config=text_config(**settings),
        image_token_id=image_token_id,
        image_seq_length=int((tile_size // vision.get("patch_size", 14) * ratio) ** 2),
        downsample_ratio=ratio,
        # InternVLConfig ties the embeddings at its own top level, whatever the text config says.
        tie_word_embeddings=bool(text.get("tie_word_embeddings", False)),
    )


def to_original_config(config: InternVLConfig) -> dict:
    """`config.json` of the original layout, as transformers 4 and other programs read it.

    Raises:
        InputError: the layout cannot say what the model is; read back it would be another.
    """
    # Annotated as all that InternVLConfig takes, and not as what it makes of it.
    text: Any = config.text_config
    if text.model_type not in _TEXT:
        raise InputError(
            f"its language model is {text.model_type!r}; {_ONLY} can be written in the original "
            "layout; use the transformers layout"
        )
    original = _to_original_config(config)
    back = from_original_config(original, config.image_token_id)
    if lost := _differences(config.to_dict(), back.to_dict()):
        raise InputError(
            f"the original layout cannot say its {', '.join(lost)}; use the transformers layout"
        )
    return original


def _differences(config: Mapping, other: Mapping) -> list[str]:
    """The settings in which two models compute something else."""
    found: list[str] = []
    for name in sorted({*config, *other} - _NO_PART):
        value, other_value = config.get(name), other.get(name)
        if isinstance(value, Mapping) and isinstance(other_value, Mapping):
            found += [f"{name}.{inner}" for inner in _differences(value, other_value)]
        elif value != other_value:
            found.append(f"{name} {value!r}")
    return found


def _to_original_config(config: InternVLConfig) -> dict:
    # Annotated as all that InternVLConfig takes, and not as what it makes of it.
    vision: Any = config.vision_config
    text: Any = config.text_config
    tile_size, patch_size = vision.image_size[0], vision.patch_size[0]
    rope = dict(text.rope_parameters)
    theta = rope.pop("rope_theta")
    default_rope = rope.get("rope_type", "default") == "default"
    llm_config = {
        field.name: getattr(text, field.name)
        for field in dataclasses.fields(text)
        if field.name not in ("rope_parameters", "layer_types", "dtype", "transformers_version")
    }
    llm_config = {k: v for k, v in llm_config.items() if isinstance(v, str | int | float | None)}
    module = f"{_SOURCE}--modeling_internvl_chat.InternVLChatModel"
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": {
            "AutoConfig": f"{_SOURCE}--configuration_internvl_chat.InternVLChatConfig",
            "AutoModel": module,
            "AutoModelForCausalLM": module,
        },
        "model_type": MODEL_TYPE,
        **_REQUIRED,
        "downsample_ratio": config.downsample_ratio,
        "dynamic_image_size": True,
        "force_image_size": tile_size,
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "use_thumbnail": True,
        "template": "internvl2_5",
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": str(config.dtype or torch.float32).removeprefix("torch."),
        "llm_config": llm_config
        | {
            "architectures": [_ARCHITECTURES[text.model_type]],
            "model_type": text.model_type,
            "rope_theta": theta,
            "rope_scaling": None if default_rope else rope | {"type": rope["rope_type"]},
            "tie_word_embeddings": config.tie_word_embeddings,
        },
        "vision_config": {theirs: getattr(vision, ours) for theirs, ours in _VISION.items()}
        | {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "image_size": tile_size,
            "patch_size": patch_size,
            "drop_path_rate": 0.0,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
    }


def from_original_state(state: Mapping[str, Tensor], tied: bool) -> dict[str, Tensor]:
    """The tensors under transformers' names; names that are not known are kept as they are.

    Args:
        tied: the head is the embedding matrix, and a copy of it in the file is one too many.

    Raises:
        InputError: a fused matrix cannot be split, or a tied head is another matrix.
    """
    result = {}
    for name, tensor in state.items():
        if name.startswith(_BLOCKS) and _FUSED in name:
            if len(tensor) % 3:
                raise InputError(f"tensor {name} of shape {tuple(tensor.shape)} is no fused qkv")
            for part, chunk in zip(_SPLIT, tensor.chunk(3), strict=True):
                # A copy: a view would keep the fused matrix in memory beside the model.
                result[_replace_prefix(name, _PREFIXES).replace(_FUSED, part)] = chunk.clone()
        else:
            result[_replace_prefix(_replace_block_part(name, _BLOCK_PARTS), _PREFIXES)] = tensor
    if tied and (head := result.pop("lm_head.weight", None)) is not None:
        embeddings = result.get("model.language_model.embed_tokens.weight")
        if embeddings is None or not torch.equal(head, embeddings):
            raise InputError(
                "its config.json ties lm_head to the embeddings, but its lm_head.weight is "
                "another matrix; set tie_word_embeddings to false in llm_config"
            )
    return result


def to_original_state(state: Mapping[str, Tensor], tied: bool) -> dict[str, Tensor]:
    """The inverse of `from_original_state`; a tied head is left out."""
    backwards = {ours: theirs for theirs, ours in _PREFIXES.items()}
    parts = {ours: theirs for theirs, ours in _BLOCK_PARTS.items()}
    result = {}
    for name, tensor in state.items():
        if tied and name == "lm_head.weight":
            continue
        if _SPLIT[0] in name:
            fused = [state[name.replace(_SPLIT[0], part)] for part in _SPLIT]
            original = _replace_prefix(name, backwards).replace(_SPLIT[0], _FUSED)
            result[original] = torch.cat(fused)
        elif not any(part in name for part in _SPLIT[1:]) or not name.startswith(
            _PREFIXES[_BLOCKS]
        ):
            original = _replace_prefix(name, backwards)
            result[_replace_block_part(original, parts)] = tensor
    return result


def _replace_prefix(name: str, prefixes: Mapping[str, str]) -> str:
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _replace_block_part(name: str, parts: Mapping[str, str]) -> str:
    """Rename what follows `vision_model.encoder.layers.<number>.`; other names are kept."""
    if not name.startswith(_BLOCKS):
        return name
    number, dot, rest = name.removeprefix(_BLOCKS).partition(".")
    return f"{_BLOCKS}{number}{dot}{_replace_prefix(rest, parts)}"


def save_original(folder: Path, config: InternVLConfig, state: Mapping[str, Tensor]) -> None:
    """Write `config.json` and safetensors of the original layout.

    Args:
        state: tensors under transformers' names, as `state_dict` gives them.
    """
    original = to_original_state(state, config.tie_word_embeddings)
    save_torch_state_dict(original, folder)
    text = json.dumps(to_original_config(config), indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
