"""The hypergradient on a real (tiny) InternVL in float64, against double backward.

transformers' RMSNorm computes in float32 whatever the model's dtype, which would limit every
comparison to about 1e-7; the fixture replaces it by the same formula in the model's own dtype.
"""

from pathlib import Path

import pytest
import torch
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from dreamprm_dist.config import UpperConfig
from dreamprm_dist.data.collate import Batch, InputFormat
from dreamprm_dist.data.loader import RankBatches
from dreamprm_dist.data.shards import ShardFolder
from dreamprm_dist.hypergradient import ESTIMATORS
from dreamprm_dist.losses import instance_losses, meta_losses
from dreamprm_dist.prm.chat import label_token_ids
from dreamprm_dist.prm.model import PRM, load_prm, load_tokenizer
from dreamprm_dist.reweighters import InstanceTable
from dreamprm_dist.reweighters.activations import ACTIVATIONS

SIZE = 6
# Two orders of differentiation in float64 agree to about 1e-13; 1e-9 leaves room for the
# conditioning of a random network and none for a wrong term.
TOLERANCE = 1e-9


def exact_rms_norm(self, hidden):
    variance = hidden.square().mean(-1, keepdim=True)
    return self.weight * (hidden * torch.rsqrt(variance + self.variance_epsilon))


class Problem:
    """A PRM in float64 with a lower and a meta batch, and v at its parameters."""

    def __init__(self, prm: PRM, tokenizer, shards: Path):
        self.prm = prm.double().train()
        self.format = InputFormat(6, prm.tile_size, prm.tokens_per_tile)
        self.lower = self._batch(tokenizer, shards / "train", 0)
        self.meta = self._batch(tokenizer, shards / "meta", 1)
        self.label_ids = label_token_ids(tokenizer)
        self.parameters = {n: p for n, p in prm.named_parameters() if p.requires_grad}
        loss = meta_losses(
            prm(self.meta),
            self.meta.step_rows,
            self.meta.true_false.double(),
            self.label_ids,
            "mean",
            "both",
        ).mean()
        gradients = torch.autograd.grad(
            loss, list(self.parameters.values()), materialize_grads=True
        )
        self.v = dict(zip(self.parameters, gradients, strict=True))

    def _batch(self, tokenizer, folder: Path, level: int) -> Batch:
        batches = RankBatches(
            ShardFolder(folder), tokenizer, self.format, SIZE, SIZE, 1, level, 0, 1
        )
        return batches[0][0]

    def losses(self, parameters) -> torch.Tensor:
        batch = self.lower
        logits = functional_call(self.prm, dict(parameters), (batch,))
        return instance_losses(logits, batch.step_targets, batch.step_rows, len(batch))

    def per_instance(self) -> torch.Tensor:
        """<grad l_i, v> by one backward pass for each instance."""
        losses = self.losses(self.parameters)
        products = []
        for loss in losses:
            gradients = torch.autograd.grad(
                loss, list(self.parameters.values()), retain_graph=True, materialize_grads=True
            )
            products.append(
                sum((g * v).sum() for g, v in zip(gradients, self.v.values(), strict=True))
            )
        return torch.stack(products)


@pytest.fixture
def problem(tiny_prm_dir: Path, tiny_shards: Path, monkeypatch) -> Problem:
    monkeypatch.setattr(Qwen2RMSNorm, "forward", exact_rms_norm)
    prm = load_prm(str(tiny_prm_dir), "fp32")
    return Problem(prm, load_tokenizer(str(tiny_prm_dir)), tiny_shards)


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


def estimate(problem: Problem, name: str) -> torch.Tensor:
    with problem.prm.forward_mode():
        return ESTIMATORS[name].function(problem.losses, problem.parameters, problem.v)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_directional_derivatives_are_the_dot_products(problem: Problem, name: str):
    truth = problem.per_instance()
    assert relative_error(estimate(problem, name), truth) < TOLERANCE
    # The instances must differ, or a permutation of them would go unnoticed.
    assert relative_error(truth.flip(0), truth) > 0.01


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_tables_hypergradient_is_double_backward(problem: Problem, activation: str):
    """-d2 L_lower / d alpha d theta . v, with L_lower = (1/G) sum_i act(alpha_i) l_i."""
    config = UpperConfig(activation_function=activation, row_update="normalized_sgd")
    raw = torch.tensor([-0.5, 0.3, 1.0, 2.0, 3.5, 1.2], dtype=torch.float64, requires_grad=True)
    parameters = list(problem.parameters.values())
    with sdpa_kernel(SDPBackend.MATH):  # flash kernels have no second derivative
        losses = problem.losses(problem.parameters)
        lower = (ACTIVATIONS[activation](raw, config) * losses).mean()
        gradients = torch.autograd.grad(
            lower, parameters, create_graph=True, materialize_grads=True
        )
        product = sum((g * v).sum() for g, v in zip(gradients, problem.v.values(), strict=True))
        (mixed,) = torch.autograd.grad(product, raw)

    ids = problem.lower.sample_ids
    table = InstanceTable(config, [16] * 4, 1, torch.device("cpu"))
    table.raw_weights = table.raw_weights.double()
    table.raw_weights[table.rows(ids)] = raw.detach()
    table.add_hypergradient(ids, -estimate(problem, "jvp") / SIZE)
    found = table.hypergradient().to_dense()[table.rows(ids)]
    assert relative_error(found, -mixed) < TOLERANCE
    for mutant in (-found, found * SIZE, found.flip(0)):
        assert relative_error(mutant, -mixed) > 0.01


@pytest.mark.parametrize("scope", ["all", "language_model", "vision_tower"])
def test_jvp_with_checkpointed_activations_and_frozen_parts(problem: Problem, scope: str):
    """Non-reentrant checkpointing must not change v or its products."""
    problem.prm.freeze(scope == "language_model", scope == "vision_tower")
    names = [n for n, p in problem.prm.named_parameters() if p.requires_grad]
    problem.parameters = {name: problem.parameters[name] for name in names}
    problem.v = {name: problem.v[name] for name in names}
    truth = problem.per_instance()
    problem.prm.checkpoint_activations()
    assert relative_error(estimate(problem, "jvp"), truth) < TOLERANCE
    assert relative_error(problem.per_instance(), truth) < TOLERANCE


def test_bf16_jvp_is_near_the_exact_product_of_the_same_rounded_weights(
    tiny_prm_dir: Path, tiny_shards: Path
):
    """bf16 has 8 bits; errors average out over a network to a few tenths of a percent here."""
    tokenizer = load_tokenizer(str(tiny_prm_dir))
    rounded = load_prm(str(tiny_prm_dir), "bf16")
    exact = Problem(load_prm(str(tiny_prm_dir), "bf16"), tokenizer, tiny_shards)
    v = {name: tangent.bfloat16() for name, tangent in exact.v.items()}
    exact.v = {name: tangent.double() for name, tangent in v.items()}
    truth = exact.per_instance()

    def losses(parameters):
        batch = exact.lower
        logits = functional_call(rounded, dict(parameters), (batch,))
        return instance_losses(logits, batch.step_targets, batch.step_rows, len(batch))

    with rounded.forward_mode():
        found = ESTIMATORS["jvp"].function(losses, dict(rounded.named_parameters()), v)
    assert relative_error(found.double(), truth) < 0.02
