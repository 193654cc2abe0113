"""Ghost products against one plain backward pass for each instance, in float64.

Both are sums of the same products in another order: they agree to about 1e-15.
"""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from problem import SIZE, Problem, relative_error
from torch import nn
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from dreamprm_dist.errors import InputError
from dreamprm_dist.hypergradient import tap
from dreamprm_dist.hypergradient.ghost import Ghost, find_taps
from dreamprm_dist.prm.batch import Batch
from dreamprm_dist.prm.model import PRM

TOLERANCE = 1e-10
WEIGHTS = torch.tensor([0.0, 1.0, -2.0, 0.5, 3.0, 0.0], dtype=torch.float64)


def ghost_products(problem: Problem, **settings) -> torch.Tensor:
    return problem.go_back(problem.v, **settings)[1].losses


def of_each_parameter(problem: Problem) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Products (B,) along v of one parameter at a time: found, and true."""
    ghost = Ghost(problem.prm)
    generator = torch.Generator().manual_seed(1)
    found, directions = {}, {}
    for name, p in problem.parameters.items():
        directions[name] = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        v = {name: directions[name]}
        found[name] = problem.go_back(v, ghost=ghost)[1].losses
    truth: dict[str, list[torch.Tensor]] = {name: [] for name in directions}
    for loss in problem.losses():
        gradients = torch.autograd.grad(
            loss, list(problem.parameters.values()), retain_graph=True, materialize_grads=True
        )
        for (name, v), gradient in zip(directions.items(), gradients, strict=True):
            truth[name].append((gradient * v).sum())
    return {name: (found[name], torch.stack(truth[name])) for name in found}


def is_exact(found: torch.Tensor, truth: torch.Tensor) -> bool:
    # Beside the rounding of what is 0 but for it, as the gradient of a key's bias.
    return bool((found - truth).norm() <= TOLERANCE * truth.norm() + 1e-14)


def test_every_use_of_every_parameter_is_tapped_once(problem: Problem):
    """Along each parameter alone; the head is the embedding matrix here, which has two uses."""
    assert problem.prm.model.lm_head.weight is problem.prm.model.get_input_embeddings().weight
    pairs = of_each_parameter(problem)
    assert [name for name, pair in pairs.items() if not is_exact(*pair)] == []
    assert sum(float(truth.norm()) > 1e-12 for _, truth in pairs.values()) > len(pairs) - 4


def vision(**settings) -> InternVLVisionConfig:
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "intermediate_size": 24}
    values = {"num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.3}
    return InternVLVisionConfig(**(sizes | values | settings))


def text(kind: type, **settings):
    sizes = {"vocab_size": 512, "hidden_size": 16, "intermediate_size": 24, "head_dim": 8}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    values = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    return kind(**(sizes | heads | values | {"initializer_range": 0.3} | settings))


ARCHITECTURES = {
    "qwen2": (vision(), text(Qwen2Config), False),
    "qwen3": (vision(attention_bias=True), text(Qwen3Config), False),
    "llama": (vision(use_qk_norm=True), text(LlamaConfig, attention_bias=True), True),
    "rms_norm": (vision(norm_type="rms_norm", use_mean_pooling=False), text(Qwen2Config), True),
    "mask_token": (vision(use_mask_token=True), text(Qwen2Config), False),
    "no_positions": (vision(use_absolute_position_embeddings=False), text(Qwen2Config), False),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_parameter_of_every_architecture(problem: Problem, name: str):
    tower, language, tied = ARCHITECTURES[name]
    config = InternVLConfig(
        vision_config=tower,
        text_config=language,
        image_token_id=problem.prm.model.config.image_token_id,
        image_seq_length=4,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    problem.prm = PRM(InternVLForConditionalGeneration(config)).double().train()
    problem.parameters = dict(problem.prm.named_parameters())
    # Norms of Qwen3 and Llama compute in float32 whatever the dtype.
    wrong = [
        name
        for name, (found, truth) in of_each_parameter(problem).items()
        if (found - truth).norm() > 1e-5 * truth.norm() + 1e-9
    ]
    assert wrong == []


@pytest.mark.parametrize("checkpointed", [False, True])
def test_weights_multiply_the_gradients_of_parameters_and_nothing_else(
    problem: Problem, checkpointed: bool
):
    plain = torch.autograd.grad(
        (WEIGHTS * problem.losses()).mean(), list(problem.parameters.values())
    )
    truth = problem.products()
    if checkpointed:
        problem.prm.checkpoint_activations()
    found = ghost_products(problem, weights=WEIGHTS)
    assert relative_error(found, truth) < TOLERANCE
    for (name, p), gradient in zip(problem.parameters.items(), plain, strict=True):
        assert (2 * p.grad - gradient).norm() <= TOLERANCE * gradient.norm() + 1e-14, name


def test_an_instance_of_weight_0_leaves_no_trace(problem: Problem):
    """Whatever its text is, no bit changes; neither does any where all weights are 0."""
    problem.prm.to(torch.bfloat16)
    problem.v = {name: v.bfloat16() for name, v in problem.v.items()}
    gradients, products = [], []
    other = problem.lower.input_ids.clone()
    rows = [0, 5]
    text = (other[rows] > 20) & (other[rows] != problem.prm.model.config.image_token_id)
    other[rows] = torch.where(text, other[rows].flip(0).clamp(21, 400), other[rows])
    assert not torch.equal(other[rows], problem.lower.input_ids[rows])
    for input_ids in (problem.lower.input_ids, other):
        problem.lower = replace(problem.lower, input_ids=input_ids)
        products.append(ghost_products(problem, weights=WEIGHTS.float()))
        gradients.append([p.grad for p in problem.parameters.values()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert torch.equal(products[0][1:5], products[1][1:5])
    assert (products[0] != products[1])[[0, 5]].all() and (products[0] != 0).all()

    found = ghost_products(problem, weights=torch.zeros(SIZE))
    assert torch.equal(found, products[1])
    assert all(p.grad.eq(0).all() for p in problem.parameters.values())


@pytest.mark.parametrize("scope", ["language_model", "last_1_layers"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_scope_is_that_part_of_the_products(problem: Problem, scope: str, checkpointed: bool):
    v = {name: problem.v[name] for name in problem.prm.parameters_in(scope)}
    truth = problem.products(v)
    if checkpointed:
        problem.prm.checkpoint_activations()
    assert relative_error(problem.go_back(v)[1].losses, truth) < TOLERANCE
    assert relative_error(truth, problem.products()) > 0.01


@pytest.mark.parametrize("frozen", ["vision_tower", "language_model", "some"])
def test_frozen_parts(problem: Problem, frozen: str):
    names = set(problem.parameters)
    if frozen == "some":  # within modules: biases, and one of the scales of a layer
        names = {n for n in names if not n.endswith(("bias", "lambda_1", "cls_token"))}
    else:
        names = {n for n in names if frozen not in n}
    problem.train_only(names)
    assert relative_error(ghost_products(problem), problem.products()) < TOLERANCE


def batch_without_images(problem: Problem) -> Batch:
    batch = problem.lower
    image = batch.input_ids == problem.prm.model.config.image_token_id
    empty = batch.shown_tiles[:0]
    text = batch.input_ids.masked_fill(image, 20)
    return replace(batch, input_ids=text, pixel_values=None, shown_tiles=empty, tile_rows=empty)


def test_a_batch_without_images(problem: Problem):
    problem.lower = batch_without_images(problem)
    assert relative_error(ghost_products(problem), problem.products()) < TOLERANCE


def test_an_instance_with_several_images_one_of_them_twice(problem: Problem):
    """Its tiles are shared within it, and their gradients are sums."""
    batch = problem.lower
    (shown,) = (batch.tile_rows == 1).nonzero(as_tuple=True)
    image = problem.prm.model.config.image_token_id
    # Row 1 shows its first tile once more, in place of text before its first step.
    tokens = batch.input_ids.clone()
    first = int(batch.step_positions[batch.step_rows == 1][0])
    tokens[1, first - 4 : first] = image
    places = batch.shown_tiles.tolist()
    after = max(i for i, place in enumerate(places) if batch.tile_rows[place] == 1) + 1
    places.insert(after, int(shown[0]))
    problem.lower = replace(batch, input_ids=tokens, shown_tiles=torch.tensor(places))
    assert relative_error(ghost_products(problem), problem.products()) < TOLERANCE


def test_a_row_of_padding_has_no_gradient_as_an_embedding(problem: Problem):
    """With a tied head v is not 0 there; ESTIMATORS are held against it in test_hypergradient."""
    embedding = problem.prm.model.get_input_embeddings()
    row = embedding.padding_idx
    assert problem.v["model.model.language_model.embed_tokens.weight"][row].norm() > 0
    first = int(problem.lower.step_positions.min())
    problem.lower.input_ids[:, first - 2] = row
    truth = problem.products()
    for name in ("ghost", "jvp"):
        assert relative_error(problem.estimate(name)[1].losses, truth) < 1e-9, name
    assert relative_error(problem.estimate("finite_difference")[1].losses, truth) < 1e-5
    embedding.padding_idx = None  # and so the row counts
    assert relative_error(problem.products(), truth) > 1e-6


def a_tile_of_another_instance(problem: Problem, patch) -> None:
    problem.lower = replace(problem.lower, tile_rows=problem.lower.tile_rows.roll(1))


def without_the_scale_of_the_loss(problem: Problem, patch) -> None:
    note = tap.TappedBatch._note_scale
    patch.setattr(tap.TappedBatch, "_note_scale", lambda self, g: note(self, torch.ones_like(g)))


def fires_twice(problem: Problem, patch) -> None:
    backward = tap.DenseTap.backward

    def twice(self, batch, x, gradient, needs_x):
        backward(self, batch, x, gradient, needs_x)
        return backward(self, batch, x, gradient, needs_x)

    patch.setattr(tap.DenseTap, "backward", twice)


def a_module_left_out(problem: Problem, patch) -> None:
    patch.setattr("dreamprm_dist.hypergradient.ghost.find_taps", lambda prm: find_taps(prm)[:-1])


def padding_has_a_gradient(problem: Problem, patch) -> None:
    problem.lower.input_ids[:, int(problem.lower.step_positions.min()) - 2] = 0
    patch.setattr(tap.LinearTap, "moved", lambda self, x, v: self.original.at(v, x))


MUTANTS = [
    a_tile_of_another_instance,
    without_the_scale_of_the_loss,
    fires_twice,
    a_module_left_out,
    padding_has_a_gradient,
]


@pytest.mark.parametrize("put_in", MUTANTS)
def test_mutants_are_found(problem: Problem, put_in: Callable, monkeypatch):
    ghost = None if put_in is a_module_left_out else Ghost(problem.prm)
    with monkeypatch.context() as patch:
        put_in(problem, patch)
        found = ghost_products(problem, ghost=ghost)
    assert relative_error(found, problem.products()) > 1e-6


class Exponential(nn.Module):
    """A norm's stand-in that is not linear in its parameter."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        return x * self.weight.exp()


class Borrower(nn.Module):
    """Computes with a parameter of another module."""

    def __init__(self, norm: nn.Module, embeddings: nn.Module):
        super().__init__()
        self.norm = norm
        self.borrowed = lambda: embeddings.position_embeddings

    def forward(self, x):
        return self.norm(x) + self.borrowed().mean()


class MixesRows(nn.Module):
    """A parameter of its own meets the batch turned around."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm, self.scale = norm, nn.Parameter(norm.weight.detach().clone())

    def forward(self, x):
        return self.norm(x) * self.scale.flip(0) + (x * self.scale).flip(0)


class Idle(nn.Module):
    """Has a parameter and lets it be."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm, self.spare = norm, nn.Linear(2, 2).double()

    def forward(self, x):
        return self.norm(x)


class Flattens(nn.Module):
    """One row for each token."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x.flatten(0, 1)).view_as(x)


def test_what_is_not_as_a_tap_takes_it_is_refused_by_name(problem: Problem):
    prm = problem.prm
    tower, language = prm.model.model.vision_tower, prm.model.model.language_model
    norm = language.norm
    place = "model.model.language_model.norm"
    for module, said in (
        (Exponential(norm.weight), f"{place} (Exponential) is not linear in its own parameters"),
        (
            Borrower(copy.deepcopy(norm), tower.embeddings),
            "model.model.vision_tower.embeddings (InternVLVisionEmbeddings) is not alone in "
            "computing with model.model.vision_tower.embeddings.position_embeddings",
        ),
        (MixesRows(norm), f"{place} (MixesRows) uses parameters of its own otherwise than row by"),
        (Flattens(norm), f"{place}.norm (Qwen2RMSNorm) gives 24 rows and not 2"),
        (Idle(norm), f"{place}.spare (Linear) takes no part in scoring an example"),
    ):
        language.norm = module
        with pytest.raises(InputError) as refused:
            Ghost(prm)
        assert said in str(refused.value) and str(refused.value).endswith("use jvp")
    language.norm = norm
    Ghost(prm)


def test_one_plus_the_weight_is_linear_too(problem: Problem):
    """As in Gemma's norms, whose output at 0 is not 0."""
    norm = problem.prm.model.model.language_model.norm

    class OnePlus(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(norm.weight.detach() - 1)

        def forward(self, x):
            return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (1 + self.weight)

    problem.prm.model.model.language_model.norm = OnePlus()
    problem.parameters = dict(problem.prm.named_parameters())
    assert relative_error(ghost_products(problem), problem.products()) < TOLERANCE
