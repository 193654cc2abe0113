"""Every estimator and reweighter on a real (tiny) InternVL in float64, against double backward."""

from pathlib import Path

import pytest
import torch
from problem import SIZE, Problem, relative_error
from reweighting import reweighter_of
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from dreamprm_dist.hypergradient import ESTIMATORS
from dreamprm_dist.hypergradient.jvp import jvp
from dreamprm_dist.hypergradient.sama import adam_derivative
from dreamprm_dist.losses import Observation
from dreamprm_dist.prm.model import load_prm, load_tokenizer
from dreamprm_dist.reweighters.activations import ACTIVATIONS
from dreamprm_dist.reweighters.base import Reweighter
from dreamprm_dist.reweighters.replicated import ReplicatedReweighter

# Two orders of differentiation in float64 agree to about 1e-13; 1e-9 leaves room for the
# conditioning of a random network and none for a wrong term.
TOLERANCE = 1e-9
TOLERANCES = {name: 1e-5 if name == "finite_difference" else TOLERANCE for name in ESTIMATORS}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_directional_derivatives_are_the_dot_products(problem: Problem, name: str):
    truth = problem.products()
    values, derivatives = problem.estimate(name)
    assert relative_error(derivatives.losses, truth) < TOLERANCES[name]
    assert relative_error(values.losses, problem.losses().detach()) < TOLERANCE
    # The instances must differ, or a permutation of them would go unnoticed.
    assert relative_error(truth.flip(0), truth) > 0.01


def test_a_tangent_takes_the_memory_of_its_own_parameter_only():
    """ZeRO keeps all parameters in one storage, of which each tangent would else be a copy."""
    flat = torch.randn(6, dtype=torch.float64)
    parameters = {"a": flat[:2], "b": flat[2:]}
    tangents = {}

    def function(values):
        tangents.update({name: forward_ad.unpack_dual(p).tangent for name, p in values.items()})
        losses = (values["a"] ** 2).sum() * values["b"]
        return Observation(losses, losses)

    v = {name: torch.randn_like(p) for name, p in parameters.items()}
    _, derivative = jvp(function, parameters, v)
    a, b = parameters["a"], parameters["b"]
    expected = 2 * (a * v["a"]).sum() * b + (a**2).sum() * v["b"]
    torch.testing.assert_close(derivative.losses, expected, rtol=1e-12, atol=0)
    for name, tangent in tangents.items():
        assert tangent.untyped_storage().nbytes() == parameters[name].numel() * 8


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimator_leaves_the_parameters_alone_also_when_the_loss_fails(
    problem: Problem, name: str, monkeypatch
):
    before = {n: p.detach().clone() for n, p in problem.parameters.items()}
    truth = problem.losses().detach()
    problem.estimate(name)

    def fails(*arguments):
        raise ArithmeticError

    with monkeypatch.context() as patch, pytest.raises(ArithmeticError):
        patch.setattr("problem.instance_losses", fails)
        problem.estimate(name)
    after = dict(problem.prm.named_parameters())
    assert all(torch.equal(after[n], p) for n, p in before.items())
    assert all(after[n] is p for n, p in problem.parameters.items())
    assert torch.equal(problem.losses(), truth)


@pytest.mark.parametrize("scope", ["language_model", "last_1_layers"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_scope_is_v_with_zeros_elsewhere(problem: Problem, name: str, scope: str):
    inside = set(problem.prm.parameters_in(scope))
    assert 0 < len(inside) < len(problem.parameters)
    part = {n: t for n, t in problem.v.items() if n in inside}
    padded = {n: t if n in inside else torch.zeros_like(t) for n, t in problem.v.items()}
    found = problem.estimate(name, v=part)[1].losses
    truth = problem.products(padded)
    assert relative_error(found, truth) < TOLERANCES[name]


def test_finite_difference_is_of_second_order(problem: Problem):
    truth = problem.products()
    errors = [
        relative_error(problem.estimate("finite_difference", radius=r)[1].losses, truth)
        for r in (0.01, 0.005)
    ]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)


def test_sama_sees_v_through_an_adam_step():
    """The diagonal is the derivative of torch's Adam step by its gradient, by double backward."""
    generator = torch.Generator().manual_seed(0)
    history = torch.randn(4, 50, generator=generator, dtype=torch.float64)
    history[:, 0] = 0  # never seen by Adam
    for steps in (1, 2, 4):
        gradient = history[steps - 1].clone().requires_grad_()
        parameter = torch.zeros(50, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([parameter], lr=1.0, betas=(0.8, 0.99), differentiable=False)
        for past in history[: steps - 1]:
            parameter.grad = past
            optimizer.step()
        state = optimizer.state[parameter]
        old = [state.get(name, torch.zeros(50)).clone() for name in ("exp_avg", "exp_avg_sq")]
        mean = 0.8 * old[0] + 0.2 * gradient
        square = 0.99 * old[1] + 0.01 * gradient.square()
        root = torch.where(square > 0, square, 1.0).sqrt().where(square > 0, 0.0)
        update = mean / (1 - 0.8**steps) / (root / (1 - 0.99**steps) ** 0.5 + 1e-8)
        (truth,) = torch.autograd.grad(update.sum(), gradient)
        before = parameter.detach().clone()
        parameter.grad = history[steps - 1]
        optimizer.step()
        torch.testing.assert_close(before - parameter.detach(), update.detach())
        found = adam_derivative(
            optimizer.state[parameter]["exp_avg"],
            optimizer.state[parameter]["exp_avg_sq"],
            history[steps - 1],
            float(steps),
            (0.8, 0.99),
            1e-8,
        )
        # The largest entry belongs to a gradient near 0, where eps is all that divides.
        torch.testing.assert_close(found[1:], truth[1:], rtol=1e-6, atol=1e-7)
        assert torch.isfinite(found).all()


NETS = [
    {"reweighter": "instance_net", "instance_net_input": name, "differentiate_weights": through}
    for name in ("step_probabilities", "representation", "loss")
    for through in (False, True)
]
SETTINGS = [
    *({"reweighter": "instance_table", "activation_function": name} for name in ACTIVATIONS),
    *NETS,
    {**NETS[0], "activation_function": "sigmoid", "num_layers": 2},
    {"reweighter": "domain_table"},
]


def build(problem: Problem, settings: dict) -> tuple[Reweighter, list[torch.Tensor]]:
    """A reweighter in float64 whose parameters are all unlike, and these parameters."""
    hidden_size = problem.prm.hidden_size
    run = {"hidden_size": hidden_size, "label_ids": problem.label_ids}
    reweighter = reweighter_of([16] * 4, **run, **settings)
    generator = torch.Generator().manual_seed(3)
    if isinstance(reweighter, ReplicatedReweighter):
        reweighter.module.double()
        parameters = list(reweighter.module.parameters())
        for p in parameters:
            p.data += 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        return reweighter, parameters
    raw = torch.tensor([-0.5, 0.3, 1.0, 2.0, 3.5, 1.2], dtype=torch.float64)
    reweighter.raw_weights = reweighter.raw_weights.double()
    reweighter.raw_weights[reweighter.partition.rows(problem.lower.sample_ids)] = raw
    return reweighter, [reweighter.raw_weights]


def double_backward(problem: Problem, reweighter: Reweighter, parameters) -> torch.Tensor:
    """-d/d alpha <grad_theta L_lower(theta, alpha), v>, L_lower = (1/G) sum_i w_i l_i, flat."""
    for p in parameters:
        p.requires_grad_(True)
    with sdpa_kernel(SDPBackend.MATH):  # flash kernels have no second derivative
        losses, features = problem.observe(problem.prm, reweighter)
        weights = reweighter.activate(reweighter.raw_weights_of(problem.lower, features))
        theta = [problem.parameters[name] for name in problem.v]
        gradients = torch.autograd.grad(
            (weights * losses).mean(), theta, create_graph=True, materialize_grads=True
        )
        product = sum((g * v).sum() for g, v in zip(gradients, problem.v.values(), strict=True))
        mixed = torch.autograd.grad(product, parameters)
    for p in parameters:
        p.requires_grad_(False)
    return -torch.cat([m.flatten() for m in mixed])


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_hypergradients_are_double_backward(problem: Problem, settings: dict):
    reweighter, parameters = build(problem, settings)
    truth = double_backward(problem, reweighter, parameters)
    assert truth.norm() > 0
    for name, estimator in ESTIMATORS.items():
        if reweighter.differentiate_weights and not estimator.differentiates_features:
            continue
        observed = problem.estimate(name, reweighter)
        reweighter.add_hypergradient(problem.lower, *observed, SIZE)
        found = reweighter.hypergradient()
        reweighter.forget()
        found = found.to_dense()
        assert relative_error(found, truth) < TOLERANCES[name], name
        for mutant in (-found, found * SIZE, found.flip(0)):
            assert relative_error(mutant, truth) > 0.01


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("scope", ["all", "language_model", "last_1_layers"])
@pytest.mark.parametrize(
    "settings", [SETTINGS[0], NETS[0], SETTINGS[-1]], ids=lambda s: s["reweighter"]
)
def test_ghost_of_a_window_is_double_backward_along_one_v(
    problem: Problem, settings: dict, scope: str, checkpointed: bool
):
    """At the parameters before each lower step, with the v of the window's start."""
    problem.v = {name: problem.v[name] for name in problem.prm.parameters_in(scope)}
    reweighter, parameters = build(problem, settings)
    generator = torch.Generator().manual_seed(0)
    moved = [
        p + 0.01 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for p in problem.parameters.values()
    ]
    starts = [[p.detach().clone() for p in problem.parameters.values()], moved]

    def go_to(step: int) -> None:
        torch._foreach_copy_([p.data for p in problem.parameters.values()], starts[step])
        problem.lower = problem.window[step]

    truths = []
    for step in range(2):
        go_to(step)
        truths.append(double_backward(problem, reweighter, parameters))
    if checkpointed:
        problem.prm.checkpoint_activations()
    for step in range(2):
        go_to(step)
        observed = problem.estimate("ghost", reweighter)
        reweighter.add_hypergradient(problem.lower, *observed, SIZE)
    found = reweighter.hypergradient().to_dense()
    assert relative_error(found, sum(truths)) < TOLERANCE
    for mutant in (2 * truths[0], 2 * truths[1], truths[1]):  # another batch or another point
        assert relative_error(mutant, sum(truths)) > 0.01


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("name", ["step_probabilities", "representation", "loss"])
def test_differentiating_weights_changes_the_hypergradient(problem: Problem, name: str):
    """Or the switch would do nothing, and the test above could not tell."""
    found = [
        double_backward(problem, *build(problem, settings))
        for settings in NETS
        if settings["instance_net_input"] == name
    ]
    assert relative_error(found[1], found[0]) > 0.01


@pytest.mark.usefixtures("one_rank")
def test_a_lower_step_leaves_nothing_in_the_net(problem: Problem):
    reweighter, parameters = build(problem, NETS[1])
    losses, features = problem.observe(problem.prm, reweighter)
    weights = reweighter.weights(problem.lower, features)
    assert weights.requires_grad
    (weights * losses).mean().backward()
    assert all(p.grad is None for p in parameters)


@pytest.mark.parametrize("scope", ["all", "language_model", "vision_tower"])
def test_jvp_with_checkpointed_activations_and_frozen_parts(problem: Problem, scope: str):
    """Non-reentrant checkpointing must not change v or its products."""
    problem.prm.freeze(scope == "language_model", scope == "vision_tower")
    problem.train_only({n for n, p in problem.prm.named_parameters() if p.requires_grad})
    truth = problem.products()
    problem.prm.checkpoint_activations()
    assert relative_error(problem.estimate("jvp")[1].losses, truth) < TOLERANCE
    assert relative_error(problem.products(), truth) < TOLERANCE


def test_bf16_errors(tiny_prm_dir: Path, tiny_shards: Path):
    """JVP and ghost in bf16 are near the exact product of the same rounded weights.

    bf16 has 8 bits; the errors average out over a network to a few tenths of a percent.
    """
    tokenizer = load_tokenizer(str(tiny_prm_dir))
    rounded = Problem(load_prm(str(tiny_prm_dir), "bf16"), tokenizer, tiny_shards)
    exact = Problem(load_prm(str(tiny_prm_dir), "bf16").double(), tokenizer, tiny_shards)
    v = {name: tangent.bfloat16() for name, tangent in exact.v.items()}
    truth = exact.products({name: tangent.double() for name, tangent in v.items()})
    errors = {
        name: relative_error(rounded.estimate(name, v=v, radius=0.01)[1].losses.double(), truth)
        for name in ESTIMATORS
    }
    assert errors["jvp"] < 0.02 and errors["ghost"] < 0.02, errors
    assert errors["finite_difference"] > 5 * errors["jvp"], errors
