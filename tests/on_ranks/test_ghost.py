"""An iteration in the order of `ghost`: where v and products are taken, and what trains."""

import copy
from dataclasses import replace

import pytest
import torch
from gradient_dot import gradient_dot
from torch import Tensor
from torch.func import functional_call

from dreamprm_dist import distributed
from dreamprm_dist.losses import instance_losses
from dreamprm_dist.prm.batch import Batch
from dreamprm_dist.training.run import TrainingRun

# Sums in float32 in another order: up to 1e-6 is seen. What is wrong errs by 1e-3 and more.
TOLERANCE = 1e-5
# The steps are long, so that the parameters of two of them cannot be mistaken for each other.
SETTINGS = [
    *("--hypergradient", "ghost", "--lr", "1e-3", "--scheduler_type", "constant"),
    *("--meta_scheduler_type", "constant", "--activation_function", "No", "--batch_size", "4"),
    *("--gradient_clipping", "0"),
]
ALL = ["--unroll_steps", "3", "--unroll_window", "all"]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).double().norm() / b.double().norm())


def parameters_of(run: TrainingRun) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in run.trainer.engine.parameters.items()}


def moments_of(run: TrainingRun, name: str = "exp_avg") -> Tensor:
    """This rank's moments of Adam: after a first step, of its gradient alone."""
    states = run.trainer.engine.zero.snapshot().optimizer
    return torch.cat([state[name] for state in states])


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(value.equal(other[name]) for name, value in one.items())


def watched(run: TrainingRun) -> list[tuple]:
    """What the run does from now on: what, the parameters before it, its arguments and result."""
    trainer, seen = run.trainer, []

    def watch(owner: object, name: str) -> None:
        call = getattr(owner, name)

        def noted(*arguments):
            before = parameters_of(run)
            seen.append((name, before, arguments, result := call(*arguments)))
            return result

        setattr(owner, name, noted)

    for name in ("meta_gradient", "lower_step"):
        watch(trainer.engine, name)
    for name in ("add_hypergradient", "step"):
        watch(trainer.reweighter, name)
    return seen


def products_of(run: TrainingRun, batch: Batch, parameters: dict[str, Tensor], v) -> Tensor:
    """<grad l_i, v> by a backward pass for each instance."""
    values = {name: p.clone().requires_grad_() for name, p in parameters.items()}
    logits = functional_call(run.trainer.engine.module, values, (batch,)).logits
    losses = instance_losses(logits, batch)
    return gradient_dot(losses, values, v)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--unroll_steps", "2"], "meta lower lower add step"),
        (ALL, "meta lower add lower add lower add step"),
        (["--unroll_steps", "2", "--rollback"], "meta lower lower add step lower lower"),
    ],
    ids=["last", "all", "rollback"],
)
def test_v_is_taken_once_before_the_window(make_run, flags: list[str], expected: str):
    run = make_run(*SETTINGS, *flags)
    seen = watched(run)
    for window, meta in (next(run.data()) for _ in range(2)):
        seen.clear()
        start = parameters_of(run)
        run.trainer.iteration(window, meta)
        assert " ".join(name.split("_")[0] for name, *_ in seen) == expected
        at = {name: [before for n, before, *_ in seen if n == name] for name, *_ in seen}
        assert equal(at["meta_gradient"][0], start) and not equal(at["step"][0], start)
        again = at["lower_step"][:: len(window)]  # with rollback, the unroll's second beginning
        assert all(equal(before, start) for before in again)
        learned = [arguments[0] for name, _, arguments, _ in seen if name == "add_hypergradient"]
        expected_batches = window if "all" in flags else window[-1:]
        for batch, (wanted,) in zip(learned, expected_batches, strict=True):
            assert batch is wanted


@pytest.mark.parametrize("size", [4, 2])
def test_each_batch_has_the_products_of_its_instances_before_its_step(make_run, size: int):
    """Also in several micro-batches."""
    run = make_run(
        *SETTINGS, *ALL,
        *("--batch_size", str(size), "--gradient_accumulation", str(4 // size)),
    )  # fmt: skip
    seen = watched(run)
    window, meta = next(run.data())
    run.trainer.iteration(window, meta)
    ((v, _),) = (result for name, *_, result in seen if name == "meta_gradient")
    before_steps = [before for name, before, *_ in seen if name == "lower_step"]
    added = [arguments for name, _, arguments, _ in seen if name == "add_hypergradient"]
    learned = [
        (batch, before)
        for micro_batches, before in zip(window, before_steps, strict=True)
        for batch in micro_batches
    ]
    for (batch, before), (of, values, derivatives, global_size) in zip(learned, added, strict=True):
        assert of is batch and global_size == 8
        truth = products_of(run, batch, before, v)
        assert relative(derivatives.losses, truth) < TOLERANCE
        logits = functional_call(run.trainer.engine.module, before, (batch,)).logits
        losses = instance_losses(logits, batch)
        assert relative(values.losses, losses.detach()) < TOLERANCE
    # Another step's parameters would be found.
    assert relative(products_of(run, batch, before_steps[0], v), truth) > 1e-3


@pytest.mark.parametrize(("size", "precision"), [("4", "fp32"), ("1", "fp32"), ("1", "bf16")])
def test_a_global_batch_of_weights_0_trains_nothing_and_is_learned_from(
    make_run, size: str, precision: str
):
    run = make_run(
        *SETTINGS, "--initialization", "0", "--batch_size", size, "--precision", precision
    )
    window, meta = next(run.data())
    seen = run.trainer.iteration(window, meta)
    assert seen.lower.applied and seen.lower.gradient_norm == 0
    for name in ("exp_avg", "exp_avg_sq"):
        assert moments_of(run, name).eq(0).all()
    assert seen.lower.weights.eq(0).all() and seen.lower.products.ne(0).all()
    (batch,) = window[0]
    reweighter = run.trainer.reweighter
    assert reweighter.raw_weights_of(batch, torch.zeros(0, 0)).ne(0).all()


def with_another_instance(batch: Batch, row: int, image_token: int) -> Batch:
    """The batch with other text, as long as before, and another image in a row."""
    ids, tiles = batch.input_ids.clone(), batch.pixel_values.clone()
    text = ids[row] != image_token
    ids[row, text] = ids[row, text].flip(0)
    shown = batch.tile_rows == row
    tiles[shown] = tiles[shown].flip(-1)
    return replace(batch, input_ids=ids, pixel_values=tiles)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_instance_of_weight_0_has_no_bit_of_the_gradient(make_run, precision: str):
    run = make_run(*SETTINGS, "--precision", precision)
    trainer, ((window, *_), meta) = run.trainer, next(run.data())
    (batch,) = window
    start = trainer.engine.zero.snapshot()
    v, *_ = trainer.meta_gradient(meta)
    token = trainer.engine.module.model.config.image_token_id
    rows = trainer.reweighter.partition.rows(batch.sample_ids)
    for weight in (0.0, 0.01):
        trainer.reweighter.raw_weights[rows] = torch.tensor([0.7, weight, 1.3, -0.4])
        moments, products = [], []
        for other in (batch, with_another_instance(batch, 1, token)):
            products.append(trainer.lower_step([other], v).products)
            moments.append(moments_of(run))
            trainer.engine.zero.restore(start)
        assert moments[0].any()
        assert moments[0].equal(moments[1]) == (weight == 0)
        same = products[0] == products[1]
        assert same.tolist() == [True, False, True, True]
    trainer.reweighter.forget()


def test_gradients_are_those_of_weighted_losses(make_run):
    """Of weights below 0 too, in several micro-batches, and whatever v is."""
    run = make_run(*SETTINGS, "--batch_size", "2", "--gradient_accumulation", "2")
    trainer, ((window, *_), meta) = run.trainer, next(run.data())
    start = trainer.engine.zero.snapshot()
    ids = torch.cat([batch.sample_ids for batch in window])
    rows = trainer.reweighter.partition.rows(ids)
    trainer.reweighter.raw_weights[rows] = torch.tensor([-1.0, 0.5, 2.0, 0.0])
    v, *_ = trainer.meta_gradient(meta)
    found = []
    for along in (None, v, {name: t * torch.nan for name, t in v.items()}):
        trainer.lower_step(window, along)
        found.append(moments_of(run))
        trainer.engine.zero.restore(start)
    plain, tapped, along_nan = found
    assert relative(tapped, plain) < TOLERANCE
    assert along_nan.equal(tapped)


def test_a_skipped_step_has_no_hypergradient_and_costs_the_others_none(make_run):
    run = make_run(*SETTINGS, *ALL, "--row_update", "normalized_sgd")
    trainer, seen, (window, meta) = run.trainer, watched(run), next(run.data())
    if distributed.rank() == 1:
        window[1][0].pixel_values[0] = torch.nan
    before = trainer.reweighter.raw_weights.clone()
    upper = trainer.iteration(window, meta).upper
    assert trainer.skipped_steps.take() == 1 and upper.squared_norm > 0
    ((v, _),) = (result for name, *_, result in seen if name == "meta_gradient")
    at = [parameters for name, parameters, *_ in seen if name == "lower_step"]
    assert not equal(at[0], at[1]) and equal(at[1], at[2])
    added = [arguments for name, _, arguments, _ in seen if name == "add_hypergradient"]
    for (batch, _, derivatives, _), k in zip(added, (0, 2), strict=True):
        assert batch is window[k][0]
        assert relative(derivatives.losses, products_of(run, batch, at[k], v)) < TOLERANCE
    moved = (trainer.reweighter.raw_weights != before).nonzero()[:, 0]
    drawn = torch.cat([window[k][0].sample_ids for k in (0, 2)])
    assert moved.equal(trainer.reweighter.partition.rows(drawn).unique())


def test_a_v_with_nan_costs_the_upper_step_alone(make_run):
    run = make_run(*SETTINGS, *ALL)
    trainer, (window, meta) = run.trainer, next(run.data())
    start, weights = trainer.engine.zero.snapshot(), trainer.reweighter.raw_weights.clone()
    poisoned, trained = copy.deepcopy(meta), []
    if distributed.rank() == 1:
        poisoned[0].pixel_values[0] = torch.nan
    for batches in (poisoned, meta):
        upper = trainer.iteration(window, batches).upper
        skipped = batches is poisoned
        assert upper.squared_norm.isnan() == trainer.skipped_steps.take() == skipped
        assert trainer.reweighter.raw_weights.equal(weights) == skipped
        trained.append(trainer.engine.zero.snapshot().partitions)
        trainer.engine.zero.restore(start)
    for one, other, before in zip(*trained, start.partitions, strict=True):
        assert one.equal(other) and not one.equal(before)


@pytest.mark.parametrize("reweighter", ["instance_table", "instance_net", "domain_table"])
def test_a_window_without_a_hypergradient_has_no_upper_step(make_run, reweighter: str):
    run = make_run(
        *SETTINGS, *("--reweighter", reweighter, "--unroll_steps", "2"),
        *("--activation_function", "sigmoid"),
    )  # fmt: skip
    trainer = run.trainer

    def state() -> dict[str, Tensor]:
        return copy.deepcopy(trainer.reweighter.state_dict())

    before, start = state(), parameters_of(run)
    assert trainer.reweighter.step().isnan()
    data = run.data()
    window, meta = next(data)
    if distributed.rank() == 1:
        for (batch,) in window:
            batch.pixel_values[0] = torch.nan
    seen = trainer.iteration(window, meta)
    assert not seen.lower.applied and seen.upper.squared_norm.isnan()
    assert trainer.skipped_steps.take() == 3
    after = state()
    assert after.keys() == before.keys() and equal(after, before)
    assert equal(parameters_of(run), start)
    seen = trainer.iteration(*next(data))
    assert seen.upper.squared_norm.isfinite() and trainer.skipped_steps.take() == 0
    after = state()
    assert int(after["schedule_steps"]) == 1
    assert not any(after[n].equal(t) for n, t in before.items() if n.endswith("parameter"))


def test_the_preconditioner_follows_from_the_optimizers_state_alone(make_run):
    """Nothing before the first step, and after a skipped step what it was before."""
    run = make_run(*SETTINGS, *ALL, "--precondition", "adam")
    trainer, (window, meta) = run.trainer, next(run.data())
    v, _ = trainer.engine.meta_gradient(meta, trainer.meta_losses)
    assert equal(trainer.engine.precondition(v), v)
    trainer.lower_step(window[0])
    after_a_step, snapshot = trainer.engine.precondition(v), trainer.engine.zero.snapshot()
    assert not equal(after_a_step, v)
    if distributed.rank() == 1:
        window[1][0].pixel_values[0] = torch.nan
    assert not trainer.lower_step(window[1]).applied
    assert equal(trainer.engine.precondition(v), after_a_step)
    assert trainer.lower_step(window[2]).applied
    assert not equal(trainer.engine.precondition(v), after_a_step)
    trainer.engine.zero.restore(snapshot)
    assert equal(trainer.engine.precondition(v), after_a_step)
    optimizer = trainer.engine.zero.optimizer
    for partition in trainer.engine.zero.partitions:
        for name in ("exp_avg", "exp_avg_sq"):
            optimizer.state[partition][name].zero_()
    assert not any(t.any() for t in trainer.engine.precondition(v).values())
