"""The original InternVL3 layout: read and written, held against a model written in its names."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    InternVLConfig,
    InternVLForConditionalGeneration,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dreamprm_dist.errors import InputError
from dreamprm_dist.prm import layout
from dreamprm_dist.prm.chat import IMAGE_CONTEXT, label_token_ids
from dreamprm_dist.prm.model import load_prm, load_tokenizer
from dreamprm_dist.training.export import save_model

TILE, PATCH, WIDTH, HEADS, LAYERS, TEXT_WIDTH = 16, 4, 32, 4, 2, 24


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, _ = x.shape
        qkv = self.qkv(x).reshape(rows, length, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        weights = (query @ key.transpose(-2, -1) * (WIDTH // HEADS) ** -0.5).softmax(-1)
        return self.proj((weights @ value).transpose(1, 2).reshape(rows, length, WIDTH))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Attention()
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(WIDTH, 2 * WIDTH), "fc2": nn.Linear(2 * WIDTH, WIDTH)}
        )
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, 1e-6), nn.LayerNorm(WIDTH, 1e-6)
        self.ls1, self.ls2 = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x)) * self.ls1
        hidden = nn.functional.gelu(self.mlp["fc1"](self.norm2(x)))
        return x + self.mlp["fc2"](hidden) * self.ls2


class Embeddings(nn.Module):
    def __init__(self):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.empty(1, 1, WIDTH))
        self.patch_embedding = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.position_embedding = nn.Parameter(torch.empty(1, (TILE // PATCH) ** 2 + 1, WIDTH))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        classes = self.class_embedding.expand(len(pixels), 1, WIDTH)
        return torch.cat([classes, patches], 1) + self.position_embedding


SIZES = {
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
ROPE = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 5e4}


class Original(nn.Module):
    """The computation of `InternVLChatModel` under its own names."""

    def __init__(self, vocab_size: int, tied: bool, language_model: str = "qwen2"):
        super().__init__()
        layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.vision_model = nn.ModuleDict(
            {"embeddings": Embeddings(), "encoder": nn.ModuleDict({"layers": layers})}
        )
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(4 * WIDTH), nn.Linear(4 * WIDTH, TEXT_WIDTH), nn.GELU()
        ).append(nn.Linear(TEXT_WIDTH, TEXT_WIDTH))
        shared = {**SIZES, "vocab_size": vocab_size, "tie_word_embeddings": tied}
        self.language_model = {
            "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**shared, rope_parameters=dict(ROPE))),
            "qwen3": lambda: Qwen3ForCausalLM(
                Qwen3Config(**shared, rope_parameters=dict(ROPE), head_dim=8)
            ),
        }[language_model]()

    def forward(self, input_ids: Tensor, pixels: Tensor, image_token: int) -> Tensor:
        x = self.vision_model["embeddings"](pixels)
        for block in self.vision_model["encoder"]["layers"]:
            x = block(x)
        side = TILE // PATCH
        x = x[:, 1:].reshape(len(x), side, side, WIDTH)
        # Pixel shuffle, version 2.
        x = x.view(len(x), side, side // 2, 2 * WIDTH).permute(0, 2, 1, 3).contiguous()
        x = x.view(len(x), side // 2, side // 2, 4 * WIDTH).permute(0, 2, 1, 3)
        features = self.mlp1(x.reshape(len(x), -1, 4 * WIDTH)).flatten(0, 1)
        embeddings = self.language_model.get_input_embeddings()(input_ids).clone()
        embeddings[input_ids == image_token] = features
        return self.language_model(inputs_embeds=embeddings).logits


def config(vocab_size: int, tied: bool, language_model: str = "qwen2") -> dict:
    """`config.json` as OpenGVLab/InternVL3-1B has it, or InternVL3_5-1B, with smaller numbers."""
    content = _internvl3(vocab_size, tied)
    if language_model == "qwen3":
        content["llm_config"] |= {
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
            "head_dim": 8,
            "max_window_layers": 2,
            "model_type": "qwen3",
        }
    return content


def _internvl3(vocab_size: int, tied: bool) -> dict:
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
        "downsample_ratio": 0.5,
        "force_image_size": TILE,
        "llm_config": {
            "_attn_implementation_autoset": True,
            "architectures": ["Qwen2ForCausalLM"],
            "hidden_act": "silu",
            "hidden_size": TEXT_WIDTH,
            "intermediate_size": 40,
            "max_position_embeddings": 512,
            "model_type": "qwen2",
            "moe_config": None,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
            "rope_theta": 5e4,
            "sliding_window": None,
            "tie_word_embeddings": tied,
            "torch_dtype": "bfloat16",
            "use_cache": False,
            "use_sliding_window": False,
            "vocab_size": vocab_size,
        },
        "model_type": "internvl_chat",
        "ps_version": "v2",
        "select_layer": -1,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "attention_dropout": 0.0,
            "drop_path_rate": 0.1,
            "dropout": 0.0,
            "hidden_act": "gelu",
            "hidden_size": WIDTH,
            "image_size": TILE,
            "initializer_factor": 0.1,
            "intermediate_size": 2 * WIDTH,
            "layer_norm_eps": 1e-06,
            "model_type": "intern_vit_6b",
            "norm_type": "layer_norm",
            "num_attention_heads": HEADS,
            "num_channels": 3,
            "num_hidden_layers": LAYERS,
            "patch_size": PATCH,
            "qk_normalization": False,
            "qkv_bias": True,
        },
    }


@pytest.fixture(
    params=[(False, "qwen2"), (True, "qwen2"), (False, "qwen3"), (True, "qwen3")],
    ids=["untied", "tied", "qwen3", "qwen3-tied"],
)
def checkpoint(request, tmp_path: Path, tiny_prm_dir: Path) -> tuple[Path, Original]:
    """A folder in the original layout, and the model that it holds."""
    tied, language_model = request.param
    tokenizer = load_tokenizer(str(tiny_prm_dir))
    folder = tmp_path / "original"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = Original(len(tokenizer), tied, language_model).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if tied:
        del state["language_model.lm_head.weight"]
    save_file(state, folder / "model.safetensors")
    text = json.dumps(config(len(tokenizer), tied, language_model))
    (folder / "config.json").write_text(text)
    return folder, model


def of_one_kind(tied: bool) -> pytest.MarkDecorator:
    """For tests to which it does not matter which language model it is."""
    return pytest.mark.parametrize("checkpoint", [(tied, "qwen2")], indirect=True, ids=["qwen2"])


@torch.no_grad()
def logits(folder: Path, model: Original) -> tuple[Tensor, Tensor]:
    """Of the loaded PRM and of the original computation, on two tiles and some text."""
    tokenizer = load_tokenizer(str(folder))
    image_token = tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT)
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(10, 300, (1, 20), generator=generator)
    input_ids[0, 3:11] = image_token
    pixels = torch.randn(2, 3, TILE, TILE, generator=generator)
    loaded = load_prm(str(folder), "fp32").eval().model(input_ids=input_ids, pixel_values=pixels)
    return loaded.logits, model(input_ids, pixels, image_token)


def test_it_computes_what_the_original_does(checkpoint) -> None:
    ours, theirs = logits(*checkpoint)
    # float32; sums are taken in another order by fused kernels.
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        checkpoint[1].vision_model["encoder"]["layers"][0].ls1[0] += 1
    ours, theirs = logits(*checkpoint)
    assert (ours - theirs).abs().max() > 1e-3  # the test could fail


def test_written_back_it_is_the_same(checkpoint, tmp_path: Path) -> None:
    folder, _ = checkpoint
    model = load_prm(str(folder), "fp32").model
    back = tmp_path / "back"
    back.mkdir()
    layout.save_original(back, model.config, model.state_dict())
    before, after = (load_file(path / "model.safetensors") for path in (folder, back))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    old, new = (json.loads((path / "config.json").read_text()) for path in (folder, back))
    for section in ("vision_config", "llm_config"):
        same = {*layout._VISION, "rope_theta", "rope_scaling", "num_key_value_heads"}
        same |= {"tie_word_embeddings", "vocab_size", "max_position_embeddings", "rms_norm_eps"}
        same |= {"architectures", "model_type", "head_dim", "attention_bias"}
        shared = same & old[section].keys()
        assert {k: old[section][k] for k in shared} == {k: new[section][k] for k in shared}
    load_tokenizer(str(folder)).save_pretrained(back)
    again = load_prm(str(back), "fp32").model.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def change(folder: Path, **tensors: Tensor | None) -> None:
    state = load_file(folder / "model.safetensors") | tensors
    save_file({k: v for k, v in state.items() if v is not None}, folder / "model.safetensors")


@of_one_kind(tied=False)
def test_tensors_that_do_not_fit_are_listed(checkpoint) -> None:
    folder, _ = checkpoint
    change(
        folder,
        **{
            "language_model.model.layers.1.mlp.up_proj.weight": None,
            "vision_model.encoder.layers.0.attn.qkv.bias": None,
            "vision_model.encoder.layers.2.ls1": torch.ones(3),
            "value_head": torch.ones(3),
            "mlp1.0.bias": torch.ones(3),
        },
    )
    with pytest.raises(ValueError) as error:
        load_prm(str(folder), "fp32")
    message = str(error.value)
    missing, left, shape = message.split("; ")[1:]
    assert "model.language_model.layers.1.mlp.up_proj.weight" in missing
    assert "attention.k_proj.bias" in missing
    assert "value_head" in left and "layer.2.lambda_1" in left
    assert shape == "of another shape: model.multi_modal_projector.layer_norm.bias"


def test_the_other_layout_is_as_strict(tiny_prm_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_prm_dir, tmp_path / "prm")
    name = next(n for n in load_file(tmp_path / "prm" / "model.safetensors") if "norm" in n)
    change(tmp_path / "prm", **{name: None, "stray": torch.ones(1)})
    with pytest.raises(ValueError, match=r"missing: .*norm.*left over: stray"):
        load_prm(str(tmp_path / "prm"))


@of_one_kind(tied=True)
def test_a_tied_head_may_be_there_when_it_is_the_same(checkpoint) -> None:
    folder, model = checkpoint
    head = model.language_model.lm_head.weight.detach().clone()
    change(folder, **{"language_model.lm_head.weight": head})
    load_prm(str(folder), "fp32")
    change(folder, **{"language_model.lm_head.weight": head + 1})
    with pytest.raises(ValueError, match="ties lm_head"):
        load_prm(str(folder), "fp32")


@of_one_kind(tied=False)
@pytest.mark.parametrize(
    ("section", "name", "value", "says"),
    [
        (None, "ps_version", "v1", "ps_version 'v1'"),
        (None, "select_layer", -4, "select_layer -4"),
        (None, "force_image_size", 32, "force_image_size is 32"),
        (None, "vision_config", None, "no vision_config"),
        ("llm_config", "model_type", "internlm2", "'internlm2'"),
        ("llm_config", "model_type", "qwen3_moe", "'qwen3_moe'; only Qwen2, .* and Qwen3"),
        ("llm_config", "hidden_size", "wide", "config.json is wrong .*'hidden_size'"),
    ],
)
def test_a_config_that_is_another_model(checkpoint, section, name, value, says) -> None:
    folder, _ = checkpoint
    content = json.loads((folder / "config.json").read_text())
    (content[section] if section else content)[name] = value
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=says):
        load_prm(str(folder))


@of_one_kind(tied=False)
def test_pickled_weights_and_a_missing_tokenizer(checkpoint) -> None:
    folder, model = checkpoint
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no safetensors file named .*pickled"):
        load_prm(str(folder))
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(ValueError, match="tokenizer"):
        load_prm(str(folder))


@of_one_kind(tied=False)
def test_a_tokenizer_without_the_image_token(checkpoint) -> None:
    folder, _ = checkpoint
    for file in folder.glob("*token*"):
        file.write_text(file.read_text().replace(IMAGE_CONTEXT, "<other>"))
    with pytest.raises(ValueError, match="its tokenizer lacks <IMG_CONTEXT>"):
        load_prm(str(folder))


def test_internvl3_1b_has_its_size() -> None:
    content = config(151674, tied=False) | {"force_image_size": 448}
    content["llm_config"] |= {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
    }
    content["vision_config"] |= {
        "hidden_size": 1024,
        "image_size": 448,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
    }
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(layout.from_original_config(content, 151667))
    # 0.80 B would mean that the head is tied to the embeddings, as InternVLConfig has it.
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(0.938e9, rel=1e-3)
    assert model.config.image_seq_length == 256


def test_the_original_tokenizer_files(reference_dir: Path, tmp_path: Path) -> None:
    """vocab.json and merges.txt, as OpenGVLab/InternVL3-1B has them, without tokenizer.json."""
    source = reference_dir / "tokenizer" / "tokenizer.json"
    content = json.loads(source.read_text(encoding="utf-8"))
    model, added = content["model"], content["added_tokens"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("\n".join(merges), encoding="utf-8")
    tokens = {token["content"]: token["id"] for token in added}
    (tmp_path / "added_tokens.json").write_text(json.dumps(tokens), encoding="utf-8")
    keys = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    decoder = {str(token["id"]): {k: token[k] for k in keys} for token in added}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": decoder})
    )
    (tmp_path / "config.json").write_text(json.dumps(config(151674, False)))
    tokenizer = load_tokenizer(str(tmp_path))
    assert label_token_ids(tokenizer) == {"+": 10, "-": 12}
    assert tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT) == 151667
    text = "<|im_start|>user\n<img><IMG_CONTEXT></img>### Question:\nWas ist 3½·x?<|im_end|>\n+"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == Tokenizer.from_file(str(source)).encode(text, add_special_tokens=False).ids


def test_a_head_of_its_own_is_not_lost_whatever_the_config_says(
    tiny_prm_dir: Path, tmp_path: Path
) -> None:
    prm, tokenizer = load_prm(str(tiny_prm_dir), "fp32"), load_tokenizer(str(tiny_prm_dir))
    head = torch.randn_like(prm.model.lm_head.weight)
    prm.model.lm_head.weight = torch.nn.Parameter(head)
    save_model(tmp_path / "untied", prm, tokenizer, original=False)
    config = tmp_path / "untied" / "config.json"
    text = json.loads(config.read_text())
    text["tie_word_embeddings"] = text["text_config"]["tie_word_embeddings"] = True
    config.write_text(json.dumps(text))
    (tmp_path / "original").mkdir()
    save_model(tmp_path / "original", load_prm(str(tmp_path / "untied"), "fp32"), tokenizer, True)
    again = load_prm(str(tmp_path / "original"), "fp32")
    assert torch.equal(again.model.lm_head.weight, head)


@torch.no_grad()
@pytest.mark.parametrize(
    ("language_model", "settings"),
    [
        ("qwen2", {}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
        ("qwen2", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 3e5}}),
        ("qwen3", {"head_dim": 16}),
        ("qwen3", {"head_dim": 6, "attention_bias": True}),
        ("qwen3", {"head_dim": 8, "rope_parameters": {**ROPE, "rope_type": "yarn"}}),
    ],
)
def test_a_language_model_comes_back_with_its_logits(
    tiny_prm_dir: Path, tmp_path: Path, language_model: str, settings: dict
) -> None:
    tokenizer = load_tokenizer(str(tiny_prm_dir))
    torch.manual_seed(0)
    model = InternVLForConditionalGeneration(other(tiny_prm_dir, language_model, settings)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    folders = [tmp_path / name for name in ("hf", "original", "back")]
    for folder in folders:
        folder.mkdir()
    model.save_pretrained(folders[0])
    tokenizer.save_pretrained(folders[0])
    for before, after in itertools.pairwise(folders):
        save_model(after, load_prm(str(before), "fp32"), tokenizer, after.name == "original")
    assert json.loads((folders[1] / "config.json").read_text())["model_type"] == "internvl_chat"
    input_ids = torch.randint(10, 300, (2, 24), generator=torch.Generator().manual_seed(1))
    expected = model(input_ids=input_ids).logits
    for folder in folders:
        found = load_prm(str(folder), "fp32").eval().model(input_ids=input_ids).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert expected.std() > 0.1


def other(
    tiny_prm_dir: Path, language_model: str, settings: dict, **changes: object
) -> InternVLConfig:
    """The tiny PRM's config with another language model, or other settings."""
    config = InternVLConfig.from_pretrained(tiny_prm_dir)
    text: PreTrainedConfig = CONFIG_MAPPING[language_model](
        **SIZES | {"vocab_size": config.text_config.vocab_size, "pad_token_id": 0} | settings
    )
    values = config.to_dict() | {"text_config": text.to_dict(), "tie_word_embeddings": False}
    values["vision_config"] |= changes.pop("vision_config", {})
    return InternVLConfig(**values | changes)


@pytest.mark.parametrize(
    ("language_model", "settings", "says"),
    [
        ("llama", {}, "'llama'"),
        ("qwen3_moe", {}, "'qwen3_moe'"),
        ("gpt_oss", {}, "'gpt_oss'"),
        ("mistral", {}, "'mistral'"),
        ("qwen2_moe", {}, "'qwen2_moe'"),
        ("gemma2", {}, "'gemma2'"),
        ("qwen3", {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
    ],
)
def test_a_language_model_that_the_original_layout_cannot_say(
    tiny_prm_dir: Path, language_model: str, settings: dict, says: str
) -> None:
    with pytest.raises(InputError, match=f"{says}.*; use the transformers layout"):
        layout.to_original_config(other(tiny_prm_dir, language_model, settings))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"projector_hidden_act": "relu"}, "projector_hidden_act 'relu'"),
        ({"vision_feature_layer": -2}, "vision_feature_layer -2"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy"),
        ({"image_seq_length": 9}, "image_seq_length 9"),
        ({"vision_config": {"image_size": [32, 64]}}, r"vision_config.image_size \[32, 64\]"),
        ({"vision_config": {"use_absolute_position_embeddings": False}}, "use_absolute"),
        ({"vision_config": {"use_mask_token": True}}, "use_mask_token"),
    ],
)
def test_other_settings_that_the_original_layout_cannot_say(
    tiny_prm_dir: Path, changes: dict, says: str
) -> None:
    layout.to_original_config(other(tiny_prm_dir, "qwen2", {}))
    with pytest.raises(InputError, match=says):
        layout.to_original_config(other(tiny_prm_dir, "qwen2", {}, **changes))
