"""Aggregations: closed forms, and a contract that every entry of the dict keeps."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dreamprm_dist.prm.aggregation import AGGREGATIONS, aggregate, pad_steps

NAMES = sorted(AGGREGATIONS)
STEPS = [0.5, 0.25, 0.8, 0.4]
CLOSED_FORMS = {
    "mean": 0.4875,
    "min": 0.25,
    "max": 0.8,
    "log_mean": 0.04**0.25,
    "product": 0.04,
    "last": 0.4,
}
probabilities = st.floats(0.01, 1.0)
solutions = st.lists(st.lists(probabilities, min_size=1, max_size=6), min_size=1, max_size=5)


def flat(rows: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.tensor([value for row in rows for value in row], dtype=torch.float64)
    owners = torch.tensor([i for i, row in enumerate(rows) for _ in row])
    return values, owners


def of(name: str, rows: list[list[float]]) -> list[float]:
    return aggregate(name, *pad_steps(*flat(rows), len(rows))).tolist()


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_closed_form(name: str) -> None:
    assert of(name, [STEPS]) == pytest.approx([CLOSED_FORMS[name]], rel=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_one_step_is_its_own_aggregate(name: str) -> None:
    assert of(name, [[0.3]]) == pytest.approx([0.3], rel=1e-14)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=50)
@given(rows=solutions)
def test_rows_are_independent_and_within_the_range_of_scores(name: str, rows: list) -> None:
    together = of(name, rows)
    alone = [of(name, [row])[0] for row in rows]
    # float64: only the order of at most six additions differs.
    assert together == pytest.approx(alone, rel=1e-13)
    assert all(0 <= value <= 1 + 1e-12 for value in together)
    assert of(name, rows[::-1]) == together[::-1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("padding", [0.0, 0.99, math.nan, math.inf])
def test_padding_changes_neither_value_nor_gradient(name: str, padding: float) -> None:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    scores = torch.tensor([[0.5, 0.2, padding], [0.3, 0.9, 0.6]], dtype=torch.float64)
    scores.requires_grad_()
    result = aggregate(name, scores, mask)
    assert result.tolist() == pytest.approx(of(name, [[0.5, 0.2], [0.3, 0.9, 0.6]]), rel=1e-13)
    (gradient,) = torch.autograd.grad(result.sum(), scores)
    assert gradient.isfinite().all()
    assert gradient[0, 2] == 0
    assert (gradient != 0).any(1).all()


@pytest.mark.parametrize("name", NAMES)
def test_gradient(name: str) -> None:
    mask = torch.tensor([[True, True, True, False], [True, False, False, False], [True] * 4])
    scores = torch.rand(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # Scores far apart compared with gradcheck's step, so that min and max are smooth there.
    assert scores.flatten().sort().values.diff().min() > 1e-4
    scores.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: aggregate(name, s, mask), (scores,))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_score_of_zero(name: str, dtype: torch.dtype) -> None:
    scores = torch.tensor([[0.0, 0.5, 0.0]], dtype=dtype, requires_grad=True)
    result = aggregate(name, scores, torch.ones(1, 3, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(result.sum(), scores)
    assert result.dtype == dtype
    assert result.isfinite().all() and gradient.isfinite().all()
    if name not in ("mean", "max"):
        assert result.item() == pytest.approx(0, abs=1e-20)


def test_unknown_name_lists_the_valid_ones() -> None:
    with pytest.raises(ValueError, match=r"'avg'.*mean, min, max, log_mean, product, last"):
        aggregate("avg", torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool))


@pytest.mark.parametrize("name", NAMES)
def test_row_without_steps(name: str) -> None:
    padded = pad_steps(torch.tensor([0.5, 0.4]), torch.tensor([0, 2]), 3)
    with pytest.raises(ValueError, match=r"row\(s\) \[1\]"):
        aggregate(name, *padded)


def test_pad_steps() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    scores, mask = pad_steps(values, torch.tensor([0, 2, 2, 2]), 3)
    assert scores.tolist() == [[1, 0, 0], [0, 0, 0], [2, 3, 4]]
    assert mask.tolist() == [[True, False, False], [False] * 3, [True] * 3]
    weights = torch.arange(9.0).reshape(3, 3)
    (gradient,) = torch.autograd.grad((scores * weights).sum(), values)
    assert gradient.tolist() == [0, 6, 7, 8]


def test_pad_steps_of_interleaved_rows_keeps_each_rows_order() -> None:
    scores, _ = pad_steps(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1, 0, 1, 0]), 2)
    assert scores.tolist() == [[2, 4], [1, 3]]


def test_pad_steps_of_nothing() -> None:
    scores, mask = pad_steps(torch.empty(0), torch.empty(0, dtype=torch.int64), 2)
    assert scores.shape == mask.shape == (2, 0)
