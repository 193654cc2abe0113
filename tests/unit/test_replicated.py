"""The reweighters that every rank holds whole, against closed forms, on one rank."""

import pytest
import torch
from reweighting import batch_of, reweighter_of

from dreamprm_dist.losses import Observation
from dreamprm_dist.prm.chat import IGNORE_INDEX
from dreamprm_dist.prm.model import StepOutput
from dreamprm_dist.reweighters.features import FEATURES

pytestmark = pytest.mark.usefixtures("one_rank")


def test_adamws_eps_is_torchs():
    """A hypergradient of eps moves a weight half as far as a large one."""
    weights = reweighter_of(
        *([2, 2],),
        **{"reweighter": "domain_table", "meta_scheduler_type": "constant", "meta_lr": 0.1},
        **{"meta_weight_decay": 0.0, "meta_gradient_clipping": 0.0},
    )
    before = weights.raw_weights.detach().clone()
    # Of two data sets with equal weights the derivatives are -+ slope / 2 times the difference.
    weights.weights(batch_of([0, 1]), torch.zeros(0, 0))
    nothing = Observation(torch.zeros(2), torch.zeros(0, 0))
    weights.add_hypergradient(
        batch_of([0, 1]), nothing, Observation(torch.tensor([1e-7, 0.0]), torch.zeros(0, 0)), 1
    )
    gradient = weights.hypergradient()
    assert gradient.abs().min() > 1e-8 and gradient.abs().max() < 1e-7
    weights.step()
    expected = before - 0.1 * gradient / (gradient.abs() + 1e-8)
    torch.testing.assert_close(weights.raw_weights.detach(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", FEATURES)
def test_unlabelled_steps_have_no_part_in_a_weight(name: str):
    """Whatever the PRM says at a step without a label, the weights stay the same."""
    weights = reweighter_of(
        [2, 2],
        hidden_size=3,
        **{"reweighter": "instance_net", "instance_net_input": name, "num_layers": 1},
    )
    with torch.no_grad():
        for parameter in weights.module.parameters():
            parameter.add_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    batch = batch_of([0, 1])
    batch.step_rows = torch.tensor([0, 0, 1])
    batch.step_targets = torch.tensor([0, IGNORE_INDEX, 1])
    losses, found = torch.tensor([0.3, 0.7]), []
    for said in (0.0, 5.0):
        logits = torch.tensor([[1.0, 0.0], [said, -said], [0.0, 2.0]])
        hidden = torch.tensor([[1.0, 2.0, 3.0], [said] * 3, [0.5, 0.0, -1.0]])
        features = weights.features(StepOutput(logits, hidden), losses, batch)
        assert len(features) == 2
        found.append(weights.weights(batch, features))
    assert found[0].equal(found[1]) and found[0][0] != found[0][1]


def test_a_raw_weight_is_the_mean_of_the_nets_outputs_over_labelled_steps():
    weights = reweighter_of(
        [2, 2], hidden_size=3, reweighter="instance_net", instance_net_input="representation"
    )
    hidden = torch.tensor([[1.0, -2.0, 3.0], [0.0, 1.0, 0.5], [4.0, 4.0, -1.0], [2.0, 0.0, 1.0]])
    first, second = (layer for layer in weights.module if isinstance(layer, torch.nn.Linear))
    assert (first.in_features, second.out_features) == (3, 1)
    with torch.no_grad():
        for parameter in weights.module.parameters():
            parameter.add_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
        outputs = torch.nn.functional.leaky_relu(hidden @ first.weight.T + first.bias)
        outputs = (outputs @ second.weight.T + second.bias)[:, 0]
    batch = batch_of([0, 1])
    batch.step_rows = torch.tensor([0, 0, 0, 1])
    batch.step_targets = torch.tensor([0, 1, 0, 1])
    losses = torch.tensor([0.3, 0.7])
    features = weights.features(StepOutput(torch.zeros(4, 2), hidden), losses, batch)
    expected = torch.stack([outputs[:3].mean(), outputs[3]])
    torch.testing.assert_close(weights.raw_weights_of(batch, features).detach(), expected)


def test_steps_are_torchs_adamws_with_clipping_and_decay():
    """Three upper steps of two domains, against AdamW on the same gradients clipped by torch."""
    weights = reweighter_of(
        *([2, 2],),
        **{"reweighter": "domain_table", "meta_scheduler_type": "constant", "meta_lr": 0.1},
        **{"meta_momentum": 0.5, "meta_weight_decay": 0.3, "meta_gradient_clipping": 0.2},
    )
    raw = torch.nn.Parameter(weights.raw_weights.detach().clone())
    optimizer = torch.optim.AdamW([raw], lr=0.1, betas=(0.5, 0.999), weight_decay=0.3)
    batch, nothing = batch_of([0, 1]), torch.zeros(0, 0)
    norms = []
    for products in ([2.0, -1.0], [0.5, 3.0], [0.01, 0.0]):
        values = Observation(torch.zeros(2), nothing)
        weights.add_hypergradient(batch, values, Observation(torch.tensor(products), nothing), 2)
        assert not any(p.requires_grad for p in weights.module.parameters())
        raw.grad = weights.hypergradient()
        norms.append(float(torch.nn.utils.clip_grad_norm_([raw], 0.2)))
        squared_norm = weights.step()
        assert float(squared_norm) == pytest.approx(norms[-1] ** 2)
        optimizer.step()
        torch.testing.assert_close(weights.raw_weights.detach(), raw.detach())
    assert max(norms) > 0.2 > min(norms)


def test_records_without_a_data_set_share_a_domain():
    context = {"read_datasets": lambda shard: [None, ""] if shard else ["b", None]}
    weights = reweighter_of([2, 2], reweighter="domain_table", context=context)
    assert weights.names == ["", "b"]
