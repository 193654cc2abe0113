"""The table's rows against plain torch and against closed forms, on one rank."""

import math

import pytest
import torch
from reweighting import NO_FEATURES, batch_of, reweighter_of
from torch import Tensor

from dreamprm_dist.losses import Observation
from dreamprm_dist.reweighters import InstanceTable, partition
from dreamprm_dist.reweighters.activations import ACTIVATIONS, raw_weights_for
from dreamprm_dist.reweighters.config import ReweighterConfig
from dreamprm_dist.reweighters.row_updates import ROW_UPDATES

ROWS = [4, 3, 3]  # sample IDs 0 to 9 in 3 shards
pytestmark = pytest.mark.usefixtures("one_rank")


def table(**settings) -> InstanceTable:
    base = {"meta_scheduler_type": "constant", "activation_function": "No", "meta_lr": 0.1}
    return reweighter_of(ROWS, num_steps=100, **(base | settings))


def add(weights: InstanceTable, ids: list[int] | Tensor, gradient: list[float] | Tensor) -> None:
    """Give the weights of some instances a derivative of the upper objective."""
    derivatives = Observation(-torch.as_tensor(gradient), NO_FEATURES)
    weights.add_hypergradient(batch_of(ids), Observation(NO_FEATURES, NO_FEATURES), derivatives, 1)


def weights_of(weights: InstanceTable, ids: list[int] | Tensor) -> Tensor:
    return weights.weights(batch_of(ids), NO_FEATURES)


def gathered(weights: InstanceTable) -> tuple[Tensor, Tensor]:
    return weights.gather(weights.local_raw_weights())


def test_rows_follow_the_sample_ids():
    weights = table()
    assert weights.partition.rows(torch.arange(10)).tolist() == [0, 4, 7, 1, 5, 8, 2, 6, 9, 3]
    weights.raw_weights.copy_(torch.arange(10))
    raw, values = gathered(weights)
    assert torch.equal(raw, values)
    assert raw[torch.arange(10)].tolist() == weights.partition.rows(torch.arange(10)).tolist()


@pytest.mark.parametrize("sample_id", [-2, 10, 11, 300])
def test_an_id_beyond_the_data_is_refused(sample_id):
    with pytest.raises(ValueError, match=f"sample_id {sample_id} "):
        weights_of(table(), [0, sample_id])


def test_another_ranks_row_is_an_error_and_never_fetched():
    weights = table()
    weights.partition.rank, weights.partition.world_size = 0, 3
    with pytest.raises(ValueError, match="sample_id 4 belongs to rank 1, not to rank 0"):
        weights_of(weights, [0, 4])


def test_normalized_sgd_is_the_hypergradient_over_its_mean_magnitude():
    weights = table(row_update="normalized_sgd", meta_weight_decay=0.5)
    add(weights, [1, 2], [3.0, -1.0])
    add(weights, [5], [-2.0])
    squared_norm = weights.step()
    raw, _ = gathered(weights)
    decayed = 1 - 0.1 * 0.5
    expected = torch.ones(10)
    expected[[1, 2, 5]] = decayed - 0.1 * torch.tensor([3.0, -1.0, -2.0]) / 2
    torch.testing.assert_close(raw, expected)
    assert squared_norm == 14


def test_an_instance_drawn_twice_gets_the_sum():
    weights = table(row_update="normalized_sgd")
    add(weights, [1, 1, 2], [1.0, 2.0, 3.0])
    assert weights.hypergradient().to_dense()[
        weights.partition.rows(torch.tensor([1, 2]))
    ].tolist() == [3, 3]


def test_no_hypergradient_no_step():
    weights = table(row_update="normalized_sgd", meta_weight_decay=0.0)
    add(weights, [1], [0.0])
    weights.step()
    assert torch.equal(weights.raw_weights, torch.ones(10))


def test_adamw_is_torchs_on_the_dense_table():
    weights = table(
        row_update="adamw", meta_momentum=0.8, meta_weight_decay=0.3, meta_gradient_clipping=0.0
    )
    dense = torch.nn.Parameter(torch.ones(10))
    optimizer = torch.optim.AdamW([dense], lr=0.1, betas=(0.8, 0.999), weight_decay=0.3)
    for ids, gradients in (([0, 3], [1.0, -2.0]), ([3, 7], [0.5, 4.0]), ([9], [1.0])):
        ids, gradients = torch.tensor(ids), torch.tensor(gradients)
        add(weights, ids, gradients)
        weights.step()
        dense.grad = torch.zeros(10).index_put((ids,), gradients)
        optimizer.step()
    torch.testing.assert_close(gathered(weights)[0], dense.detach())


def test_adamws_eps_is_torchs():
    """A gradient of eps moves a row half as far as a large one."""
    weights = table(row_update="adamw", meta_weight_decay=0.0)
    add(weights, [1, 2], [1e-8, 1e-2])
    weights.step()
    moved = 1 - gathered(weights)[0][[1, 2]]
    torch.testing.assert_close(moved, torch.tensor([0.05, 0.1]), rtol=1e-3, atol=0)


@pytest.mark.parametrize("row_update", ROW_UPDATES)
def test_decay_to_initialization(row_update):
    """Of two rows with no hypergradient left the one decays to 0, the other to where it began."""
    results = {}
    for to_start in (False, True):
        weights = table(
            row_update=row_update,
            initialization=2.0,
            meta_lr=0.5,
            meta_weight_decay=0.5,
            decay_to_initialization=to_start,
        )
        weights.raw_weights[weights.partition.rows(torch.tensor([4]))] = 3.0
        for _ in range(40):
            add(weights, [4], [0.0])
            weights.step()
        results[to_start] = float(weights_of(weights, [4]))
    assert results[False] == pytest.approx(0.0, abs=1e-4)
    assert results[True] == pytest.approx(2.0, abs=1e-4)


def test_clipping_takes_the_norm_over_all_rows():
    clipped = table(row_update="adamw", meta_gradient_clipping=1.0)
    whole = table(row_update="adamw", meta_gradient_clipping=0.0)
    for weights, gradient in ((clipped, [6.0, 8.0]), (whole, [0.6, 0.8])):
        add(weights, [1, 2], gradient)
        weights.step()
    torch.testing.assert_close(clipped.raw_weights, whole.raw_weights)
    moments = [t for n, t in clipped.state_dict().items() if n.endswith("exp_avg")]
    assert torch.cat(moments).norm() == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("name", "raw", "weight", "slope"),
    [
        ("LeakyReLU", [-1.0, 2.0], [-0.01, 2.0], [0.01, 1.0]),
        ("ReLU", [-1.0, 2.0], [0.0, 2.0], [0.0, 1.0]),
        ("No", [-1.0, 2.0], [-1.0, 2.0], [1.0, 1.0]),
        ("sigmoid", [0.0, 0.0], [0.5, 0.5], [0.25, 0.25]),
        ("Clip", [-1.5, 2.0], [-1.0, 2.0], [0.0, 1.0]),
        ("Project", [-1.0, 3.0], [-1.0, 3.0], [1.0, 1.0]),
    ],
)
def test_activations_and_their_slopes(name, raw, weight, slope):
    weights = table(activation_function=name)
    ids = torch.tensor([0, 4])
    weights.raw_weights[weights.partition.rows(ids)] = torch.tensor(raw)
    torch.testing.assert_close(weights_of(weights, ids), torch.tensor(weight))
    add(weights, ids, torch.tensor([5.0, 7.0]))
    expected = torch.tensor(slope) * torch.tensor([5.0, 7.0])
    torch.testing.assert_close(weights.hypergradient().values(), expected)


@pytest.mark.parametrize(
    ("name", "weight", "raw", "lacking"),
    [
        ("LeakyReLU", [-0.01, 2.0], [-1.0, 2.0], []),
        ("ReLU", [0.0, 2.0], [0.0, 2.0], [-1e-3, -2.0]),
        ("No", [-1.0, 2.0], [-1.0, 2.0], []),
        ("sigmoid", [0.5, 1 / (1 + math.e), 1e-30], [0.0, -1.0, -69.0776], [0.0, 1.0, -1.0, 2.0]),
        ("Clip", [0.25, 1.5, 2.0], [0.25, 1.5, 2.0], [0.249, 2.001]),
        ("Project", [0.25, 1.5, 2.0], [0.25, 1.5, 2.0], [0.249, 2.001, -1.0]),
    ],
)
def test_given_weights_are_the_activations_of_raw_ones(name, weight, raw, lacking):
    """The table starts from a raw weight of each; where there is none, it says so by NaN."""
    given = torch.tensor(weight * 5)[:10]
    context = {"given_weights": lambda shard: given[shard::3]}
    bounds = {"weight_min": 0.25, "weight_max": 2.0}
    weights = table(activation_function=name, context=context, **bounds)
    torch.testing.assert_close(gathered(weights)[0], torch.tensor(raw * 5)[:10])
    # 4e-6 is what a logit of -69 in float32 loses.
    torch.testing.assert_close(gathered(weights)[1], given, rtol=1e-5, atol=0)
    beyond = torch.tensor([*lacking, math.inf, -math.inf, math.nan])
    assert raw_weights_for(beyond, weights.config).isnan().all()


def test_a_bound_that_float32_rounds_is_a_bound():
    """0.7 is larger than the float32 that a projection to 0.7 leaves, as a run exports it."""
    config = ReweighterConfig(activation_function="Project", weight_min=0.7)
    assert float(torch.tensor(0.7)) < 0.7
    assert not raw_weights_for(torch.tensor([0.7, 3.0]), config).isnan().any()


@pytest.mark.parametrize("row_update", ROW_UPDATES)
def test_projection_keeps_weights_within_the_bounds_and_alive(row_update):
    weights = table(
        activation_function="Project",
        weight_min=0.0,
        meta_lr=3.0,
        meta_weight_decay=0.0,
        row_update=row_update,
    )
    ids = torch.tensor([0, 4])
    add(weights, ids, torch.tensor([1.0, -1.0]))
    weights.step()
    assert weights_of(weights, ids).tolist() == [0.0, 3.0]
    for _ in range(3):
        add(weights, ids, torch.tensor([-1.0, 1.0]))
        weights.step()
    low, high = weights_of(weights, ids).tolist()
    assert low > 0.0 and high < 3.0


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("row_update", ROW_UPDATES)
def test_every_combination_moves_against_the_hypergradient(activation, row_update):
    weights = table(activation_function=activation, row_update=row_update, meta_weight_decay=0.0)
    ids = torch.tensor([2, 3])
    add(weights, ids, torch.tensor([1.0, -1.0]))
    weights.step()
    lower, higher = weights_of(weights, ids).tolist()
    assert lower < weights_of(weights, [5]) < higher


def test_statistics_are_those_of_all_weights():
    weights = table()
    weights.raw_weights.copy_(torch.linspace(0, 9, 10)[torch.randperm(10)])
    statistics = weights.statistics()
    assert statistics["mean"] == pytest.approx(4.5)
    assert (statistics["min"], statistics["max"]) == (0, 9)
    for q in (5, 25, 50, 75, 95):
        exact = float(weights.raw_weights.quantile(q / 100, interpolation="lower"))
        # One bin of the histogram is 9 / 2048 wide; "lower" and the histogram may differ by a row.
        assert exact - 9 / 2048 <= statistics[f"q{q:02d}"] <= exact + 1 + 9 / 2048


def test_a_quantile_is_the_upper_edge_of_the_first_bin_that_reaches_its_share():
    weights = table()
    weights.raw_weights.copy_(torch.arange(10.0))
    statistics = weights.statistics()
    for q, value in ((5, 0), (25, 2), (50, 4), (75, 7), (95, 9)):
        edge = min(value * 2048 // 9 + 1, 2048)
        assert statistics[f"q{q:02d}"] == pytest.approx(9 * edge / 2048)


def test_equal_weights_have_equal_statistics():
    assert set(table().statistics().values()) == {1.0}


@pytest.mark.parametrize("row_update", ROW_UPDATES)
@pytest.mark.parametrize("schedule", ["cosine_schedule_with_warmup", "step_lr", "constant"])
def test_a_table_put_back_goes_on_as_the_one_that_was_saved(row_update: str, schedule: str):
    def step(weights: InstanceTable, number: int) -> None:
        add(weights, [number, 7], [0.5, -1.0 / number])
        weights.step()

    settings = {"row_update": row_update, "meta_scheduler_type": schedule}
    settings["meta_scheduler_step_size"] = 2
    saved, restored = table(**settings), table(**settings)
    for number in (1, 2, 3):
        step(saved, number)
    restored.load_state_dict({name: value.clone() for name, value in saved.state_dict().items()})
    for number in (4, 5, 6):
        assert saved.lr == restored.lr
        step(saved, number)
        step(restored, number)
        assert torch.equal(saved.raw_weights, restored.raw_weights)


@pytest.mark.parametrize("row_update", ROW_UPDATES)
def test_rows_and_moments_find_their_owners_on_any_number_of_ranks(row_update, monkeypatch):
    def on_rank(rank: int, world_size: int) -> InstanceTable:
        monkeypatch.setattr(partition.distributed, "rank", lambda: rank)
        monkeypatch.setattr(partition.distributed, "world_size", lambda: world_size)
        settings = {"row_update": row_update, "activation_function": "No"}
        weights = reweighter_of([3, 3, 3, 2], num_steps=100, **settings)
        monkeypatch.undo()
        return weights

    def states(tables: list[InstanceTable]) -> dict[str, Tensor]:
        return {name: t for table in tables for name, t in table.state_dict().items()}

    before = [on_rank(rank, 2) for rank in range(2)]
    for step in range(2):
        for rank, weights in enumerate(before):
            ids = torch.tensor([rank, rank + 2, rank + 4 + 2 * step])
            add(weights, ids, 1.0 + ids)
            weights.step()
            weights.raw_weights += torch.rand(len(weights.raw_weights))  # no two rows alike
    saved = states(before)
    assert len(torch.cat([t for n, t in saved.items() if n.endswith(".parameter")]).unique()) == 11
    for world_size in (1, 2, 4):
        after = [on_rank(rank, world_size) for rank in range(world_size)]
        for weights in after:
            weights.load_state_dict(saved)
        found = states(after)
        assert found.keys() == saved.keys()
        assert all(t.equal(saved[name]) for name, t in found.items())
