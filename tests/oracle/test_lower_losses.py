"""The lower losses that read roll-outs: closed forms, scipy's distribution and double precision."""

import math

import pytest
import torch
import torch.nn.functional as F
from problem import Problem, relative_error
from reweighting import steps_of
from scipy.stats import betabinom, binom
from test_hypergradient import TOLERANCE, TOLERANCES
from torch import Tensor

from dreamprm_dist.errors import InputError
from dreamprm_dist.hypergradient import ESTIMATORS
from dreamprm_dist.losses import LowerLossConfig, beta_binomial_losses, instance_losses
from dreamprm_dist.prm.chat import IGNORE_INDEX

LABELS = {"+": 1, "-": 3}
# Of each step: instance, label, right roll-outs, all of them. The fourth instance has no steps.
STEPS = [
    (0, "+", 3, 16),
    (0, "-", 0, 4),
    (0, None, 5, 8),  # no label, no loss
    (1, "-", 0, 0),  # only a label
    (1, "+", 0, 0),
    (1, "+", 7, 7),
    (2, None, 0, 0),
    (4, "-", 1, 16),
    (4, "-", 0, 0),
]
NUM_ROWS = 5
BATCH = steps_of(
    torch.tensor([LABELS.get(label or "", IGNORE_INDEX) for _, label, *_ in STEPS]),
    torch.tensor([row for row, *_ in STEPS]),
    NUM_ROWS,
    [(correct, total) for *_, correct, total in STEPS],
)
CONFIGS = {
    "hard": LowerLossConfig(),
    "hard, weighted": LowerLossConfig(negative_weight=3.0),
    "soft": LowerLossConfig(label="soft"),
    "soft, weighted": LowerLossConfig(label="soft", negative_weight=0.25),
    "beta_binomial": LowerLossConfig(step_loss="beta_binomial", concentration=2.5),
    "beta_binomial, weighted": LowerLossConfig(step_loss="beta_binomial", negative_weight=3.0),
}


def some_logits(dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return 2 * torch.randn(len(STEPS), 6, generator=generator, dtype=torch.float64).to(dtype)


def written_out(logits: list[list[float]], config: LowerLossConfig) -> list[float]:
    """The losses of BATCH in plain Python."""
    losses: list[list[float]] = [[] for _ in range(NUM_ROWS)]
    for (row, label, correct, total), x in zip(STEPS, logits, strict=True):
        if label is None:
            continue
        everything = sum(math.exp(value) for value in x)
        plus, minus = (math.exp(x[LABELS[sign]]) / everything for sign in "+-")
        if not total:
            correct, total = int(label == "+"), 1
        weight = config.negative_weight if label == "-" else 1.0
        if config.step_loss == "beta_binomial":
            mu, c = plus / (plus + minus), config.concentration
            loss = -weight * float(betabinom.logpmf(correct, total, mu * c, (1 - mu) * c))
        elif config.label == "soft":
            p = correct / total
            loss = -p * math.log(plus) - config.negative_weight * (1 - p) * math.log(minus)
        else:
            loss = -weight * math.log(plus if label == "+" else minus)
        losses[row].append(loss)
    return [sum(of_row) / max(len(of_row), 1) for of_row in losses]


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_are_those_written_out(name: str):
    expected = written_out(some_logits().tolist(), CONFIGS[name])
    found = instance_losses(some_logits(), BATCH, CONFIGS[name], LABELS)
    # scipy's own log-gammas are right to about 1e-14 of numbers up to 30.
    torch.testing.assert_close(found.tolist(), expected, rtol=1e-12, atol=1e-12)
    assert found[2] == found[3] == 0
    for dtype in (torch.float32, torch.bfloat16):
        logits = some_logits(dtype)
        found = instance_losses(logits, BATCH, CONFIGS[name], LABELS)
        assert found.dtype == torch.float32
        expected = written_out(logits.double().tolist(), CONFIGS[name])
        torch.testing.assert_close(found.tolist(), expected, rtol=1e-6, atol=1e-6)


def test_the_default_is_the_cross_entropy_to_the_bit():
    for dtype in (torch.float32, torch.bfloat16):
        logits, targets = some_logits(dtype), BATCH.step_targets
        steps = F.cross_entropy(logits.float(), targets, reduction="none", ignore_index=-100)
        totals = torch.zeros(NUM_ROWS).index_add(0, BATCH.step_rows, steps)
        counts = torch.zeros(NUM_ROWS).index_add(0, BATCH.step_rows, (targets != -100).float())
        expected = totals / counts.clamp(min=1)
        assert torch.equal(instance_losses(logits, BATCH), expected)
        assert torch.equal(instance_losses(logits, BATCH, LowerLossConfig(), LABELS), expected)
        weighted = instance_losses(logits, BATCH, CONFIGS["hard, weighted"], LABELS)
        assert (weighted != expected).tolist() == [True, True, False, False, True]


@pytest.mark.parametrize("name", CONFIGS)
def test_derivatives_of_both_modes_in_double_precision(name: str):
    def losses(logits: Tensor) -> Tensor:
        return instance_losses(logits, BATCH, CONFIGS[name], LABELS)

    logits = some_logits().requires_grad_()
    assert torch.autograd.gradcheck(losses, logits, check_forward_ad=True)
    (gradient,) = torch.autograd.grad(losses(logits).sum(), logits)
    labelled = BATCH.step_targets != IGNORE_INDEX
    assert gradient[~labelled].eq(0).all() and gradient[labelled].ne(0).any(1).all()


@pytest.mark.parametrize("concentration", [1e-3, 1.0, 8.0, 1e3, 1e6])
def test_the_beta_binomial_is_scipys(concentration: float):
    for log_odds in (-30.0, -2.0, 0.0, 0.7, 30.0):
        for correct, total in ((0, 1), (1, 1), (0, 16), (3, 16), (16, 16), (200, 1000)):
            logits = torch.tensor([[0.0, log_odds, 5.0, 0.0]], dtype=torch.float64)
            counts = (torch.tensor([float(n)], dtype=torch.float64) for n in (correct, total))
            found = float(beta_binomial_losses(logits, *counts, LABELS, concentration))
            mu = [1 / (1 + math.exp(sign * log_odds)) for sign in (-1, 1)]
            truth = -betabinom.logpmf(correct, total, mu[0] * concentration, mu[1] * concentration)
            # Both subtract log-gammas of up to concentration + total, in float64.
            assert found == pytest.approx(truth, rel=1e-9, abs=1e-14 * 15 * (concentration + 1e3))
    for correct in range(5):  # independent roll-outs
        logits = torch.tensor([[0.0, 0.7, 0.0, 0.0]], dtype=torch.float64)
        counts = (torch.tensor([float(n)], dtype=torch.float64) for n in (correct, 4))
        found = float(beta_binomial_losses(logits, *counts, LABELS, 1e8))
        truth = -binom.logpmf(correct, 4, 1 / (1 + math.exp(-0.7)))
        assert found == pytest.approx(truth, abs=1e-6)  # of order 1 / concentration


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_that_round_to_0_or_1_leave_losses_and_gradients_finite(name: str):
    for size in (1e3, 1e4):
        logits = torch.zeros(len(STEPS), 6)
        logits[:, 1], logits[:, 3] = size, -size
        for sign in (1, -1):
            signed = (sign * logits).requires_grad_()
            losses = instance_losses(signed, BATCH, CONFIGS[name], LABELS)
            (gradient,) = torch.autograd.grad(losses.sum(), signed)
            assert losses.isfinite().all() and gradient.isfinite().all()
            assert losses.max() > size / 4


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "hard"])
def test_every_estimator_differentiates_every_loss(problem: Problem, estimator: str, name: str):
    plain = problem.products()
    problem.lower_loss = CONFIGS[name]
    # Of 0 to 16 roll-outs, and of every third step nothing.
    total = torch.arange(len(problem.lower.step_rows)) * 7 % 17
    total[::3] = 0
    correct = (total * 0.6).long()
    problem.lower.step_counts = torch.stack([correct, total], dim=1)
    truth = problem.products()
    found = problem.estimate(estimator)[1].losses
    assert relative_error(found, truth) < TOLERANCES[estimator]
    assert relative_error(plain, truth) > 0.01
    assert TOLERANCE < 0.01


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label": "soft", "label_threshold": 0.5}, "label_threshold .* but label soft reads"),
        ({"step_loss": "beta_binomial", "label_threshold": 0.0}, "but step_loss beta_binomial"),
        ({"step_loss": "beta_binomial", "label": "soft"}, "leave out label soft"),
        ({"label_threshold": 1.0}, "label_threshold is 1.0; it must be at least 0 and below 1"),
        ({"negative_weight": 0.0}, "negative_weight is 0.0; it must be above 0"),
        ({"concentration": 0.0}, "concentration is 0.0; it must be above 0"),
        ({"concentration": math.inf}, "concentration is inf; it must be a finite number"),
        ({"label": "smooth"}, "label 'smooth' is unknown; use one of hard, soft"),
    ],
)
def test_flags_that_contradict_each_other(settings: dict, message: str):
    with pytest.raises(InputError, match=message):
        LowerLossConfig(**settings)
