"""A run's policy: schedules, rollback, which data are learned from and which only measured on."""

import json
import math
import os
from itertools import chain, islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from data_tools.shard import shard_file
from dreamprm_dist import distributed
from dreamprm_dist.data.instance_values import source_ids_of
from dreamprm_dist.data.shards import ShardFolder
from dreamprm_dist.losses import LowerLossConfig, instance_losses
from dreamprm_dist.prm.batch import Batch, InputFormat, collate
from dreamprm_dist.prm.chat import IGNORE_INDEX
from dreamprm_dist.prm.model import PRECISIONS, PRM, load_prm, load_tokenizer
from dreamprm_dist.training.loader import RankBatches

LR, META_LR, STEPS, ITERATIONS = 1e-3, 0.2, 2, 8
SETTINGS = [
    *("--lr", str(LR), "--meta_lr", str(META_LR), "--iteration_num", str(ITERATIONS)),
    *("--unroll_steps", str(STEPS), "--batch_size", "2", "--activation_function", "sigmoid"),
]


def cosine(step: int, num_steps: int) -> float:
    """The factor at a step (from 0): 5 % linear warm-up, then half a cosine to 0."""
    warmup = round(0.05 * num_steps)
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (num_steps - warmup)))


def step_lr(step: int, num_steps: int) -> float:
    """3 steps of each value, then three quarters of it."""
    return 0.75 ** (step // 3)


SCHEDULES = {
    "cosine_schedule_with_warmup": (cosine, []),
    "step_lr": (
        step_lr,
        [
            *("--scheduler_step_size", "3", "--scheduler_gamma", "0.75"),
            *("--meta_scheduler_step_size", "3", "--meta_scheduler_gamma", "0.75"),
        ],
    ),
}


@pytest.mark.parametrize(
    ("name", "reweighter", "options"),
    [
        ("cosine_schedule_with_warmup", "instance_table", []),
        ("cosine_schedule_with_warmup", "instance_table", ["--rollback"]),
        ("cosine_schedule_with_warmup", "instance_net", []),
        ("step_lr", "domain_table", ["--rollback"]),
    ],
)
def test_learning_rates_follow_the_closed_formula_on_both_levels(
    make_run, name: str, reweighter: str, options: list[str]
):
    """The lower horizon is every lower step, the upper one every upper step.

    An unroll that is rolled back and taken again moves its schedule once.
    """
    factor, flags = SCHEDULES[name]
    schedules = ["--scheduler_type", name, "--meta_scheduler_type", name, *flags]
    run = make_run(*SETTINGS, *schedules, "--reweighter", reweighter, *options)
    lower_steps = ITERATIONS * STEPS
    for iteration, (window, meta) in enumerate(run.data()):
        assert run.trainer.engine.lr == pytest.approx(LR * factor(iteration * STEPS, lower_steps))
        seen = run.trainer.iteration(window, meta)
        last = iteration * STEPS + STEPS - 1
        assert seen.lower.lr == pytest.approx(LR * factor(last, lower_steps), abs=1e-12)
        assert seen.upper.lr == pytest.approx(META_LR * factor(iteration, ITERATIONS), abs=1e-12)
    assert iteration == ITERATIONS - 1
    # The formula must tell the mutants apart: another horizon, another share of warm-up.
    assert cosine(3, lower_steps) != cosine(3, ITERATIONS) and round(0.05 * lower_steps) == 1


def test_a_finished_run_goes_on_in_the_longer_schedule(make_run, tmp_path: Path):
    """With more iterations: rates are those that the longer run has at its place."""
    folder = distributed.broadcast_text(str(tmp_path))
    flags = [*SETTINGS, "--unroll_steps", "1", "--out", f"{folder}/run"]
    longer = str(2 * ITERATIONS)
    make_run(*flags).train()
    distributed.barrier()
    before = (Path(folder) / "run" / "metrics.jsonl").read_text()
    assert json.loads(before.splitlines()[-1])["iteration"] == ITERATIONS
    make_run(*flags, "--iteration_num", longer).train()
    distributed.barrier()
    after = (Path(folder) / "run" / "metrics.jsonl").read_text()
    assert after.startswith(before)
    lines = [json.loads(line) for line in after.removeprefix(before).splitlines()]
    assert [line["iteration"] for line in lines] == list(range(ITERATIONS + 1, 2 * ITERATIONS + 1))
    for line in lines:
        factor = cosine(line["iteration"] - 1, 2 * ITERATIONS)
        assert line["lr"] == pytest.approx(LR * factor)
        assert line["meta_lr"] == pytest.approx(META_LR * factor)


def batches_of(folder: Path, labels: LowerLossConfig | None = None) -> RankBatches:
    """This rank's half of a training folder."""
    return RankBatches(
        shards=ShardFolder(folder),
        tokenizer=load_tokenizer(os.environ["TESTS_ON_RANKS"].split(":")[0]),
        format=InputFormat(6, 28, 4),
        global_batch_size=2,
        micro_batch_size=1,
        seed=1,
        level=0,
        rank=distributed.rank(),
        world_size=2,
        labels=labels,
    )


@pytest.mark.parametrize(
    ("signs", "lacking"),
    [
        (["+", "-"], []),
        ([None, "+"], ["-"]),
        ([None, "-"], ["+"]),
        (["+", "+"], ["-"]),
    ],
)
def test_labels_of_all_ranks_count(tmp_path: Path, caplog, process_group, signs, lacking):
    """Each rank has a record; one that lacks a sign, or all labels, is no fault of the data."""
    folder = Path(distributed.broadcast_text(str(tmp_path)))
    if distributed.rank() == 0:
        turns = [[{"from": "human", "value": "Q"}, {"from": "gpt", "value": s}] for s in signs]
        file = folder / "records.json"
        file.write_text(json.dumps([{"id": i, "conversations": t} for i, t in enumerate(turns)]))
        shard_file(file, folder / "shards", "training", 2)
        caplog.clear()  # of what sharding says
    distributed.barrier()
    batches_of(folder / "shards").check_rows(process_group)
    expected = [f"has no step labelled {sign}:" for sign in lacking if distributed.rank() == 0]
    said = [r.getMessage() for r in caplog.records if "one answer" in r.getMessage()]
    assert len(said) == len(expected)
    assert all(text in message for text, message in zip(expected, said, strict=True))


def test_roll_outs_of_all_ranks_count(tmp_path: Path, caplog, process_group):
    """Rank 0's only step knows none; what teaches one answer is what is trained on."""
    folder = Path(distributed.broadcast_text(str(tmp_path)))
    if distributed.rank() == 0:
        human, step = {"from": "human", "value": "Q"}, {"from": "gpt", "value": "+"}
        counted = step | {"num_mc_correct": 1, "num_mc_total": 4}
        records = [{"id": i, "conversations": [human, s]} for i, s in enumerate((step, counted))]
        (folder / "records.json").write_text(json.dumps(records))
        shard_file(folder / "records.json", folder / "shards", "training", 2)
    distributed.barrier()
    for flags, lacks in (
        ({}, True),
        ({"label_threshold": 0.2}, True),
        ({"label_threshold": 0.25}, False),
        ({"label": "soft"}, False),
        ({"step_loss": "beta_binomial"}, False),
    ):
        caplog.clear()
        batches_of(folder / "shards", LowerLossConfig(**flags)).check_rows(process_group)
        warned = "has no step labelled -:" in caplog.text
        assert warned == (lacks and distributed.rank() == 0), flags


def test_adamws_eps_is_torchs(make_run):
    """Clipped to a norm of eps, gradients move the parameters by far less than the rate."""
    run = make_run(
        *SETTINGS, *("--scheduler_type", "constant", "--weight_decay", "0"),
        *("--gradient_clipping", "1e-8"),
    )  # fmt: skip
    engine = run.trainer.engine
    before = engine.zero.snapshot().partitions
    window, _ = next(run.data())
    run.trainer.lower_step(window[0])
    after = engine.zero.snapshot()
    for old, new, state in zip(before, after.partitions, after.optimizer, strict=True):
        gradient = state["exp_avg"] / (1 - 0.9)  # after one step
        expected = old - LR * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(new, expected, rtol=0, atol=LR * 1e-3)
        assert (new - old).abs().max() > LR / 100


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_tiles_travel_in_the_models_dtype(make_run, precision: str):
    run = make_run("--precision", precision, "--batch_size", "4")
    window, meta = next(run.data())
    found = {b.pixel_values.dtype for b in chain(*window, meta) if b.pixel_values is not None}
    assert found == {PRECISIONS[precision]}


def sample_ids(batches: list) -> set[int]:
    return {int(i) for batch in batches for i in batch.sample_ids}


@pytest.mark.parametrize("grouped", [[], ["--group_meta_by_question"]])
def test_held_out_meta_questions_are_never_learned_from(make_run, grouped: list[str]):
    run = make_run("--meta_validation_fraction", "0.4", "--meta_batch_size", "2", *grouped)
    drawn = set()
    for _, meta in islice(run.data(), 40):
        drawn |= sample_ids(meta)
    measured = sample_ids(list(run.validation_batches.every_row(0, run.device)))
    # This rank's shards, all of whose rows are one or the other.
    shards = run.meta_batches.shards
    rows = run.validation_batches.shards.num_rows + shards.num_rows
    assert rows == 29 and drawn and measured
    assert not drawn & measured
    mine = range(distributed.rank(), 4, 2)
    kept = {i for s in mine for i in run.meta_batches.shards.read_column(s, "sample_id")}
    assert drawn == kept


@pytest.mark.parametrize(
    "kind", [["--baseline"], ["--unroll_window", "all"], ["--reweighter", "instance_net"]]
)
def test_a_meta_set_that_is_trained_on_keeps_its_held_out_questions_out(make_run, kind):
    run = make_run(
        *("--meta_validation_fraction", "0.4", "--train_on_meta", "answer"),
        *("--batch_size", "4", "--iteration_num", "30", *kind),
    )
    joined, train = run.lower_batches.shards, run.train_shards
    behind = {s: train.rows_per_shard[s] for s in range(distributed.rank(), 4, 2)}
    trained = {i for s, rows in behind.items() for i in joined.read_column(s, "source_id")[rows:]}
    batches = run.validation_batches.shards
    held_out = {i for s in range(4) for i in batches.read_column(s, "source_id")}
    assert trained and held_out and not trained & held_out
    drawn, weights, weighted = 0, [], []
    for window, meta in run.data():
        for batch in window[0]:
            drawn += len(batch)
            weighted += batch.weighted.tolist()
        if len(weights) < 3:
            seen = run.trainer.iteration(window, meta)
            weights += seen.lower.weights[~window[0][0].weighted].tolist()
    assert set(weights) <= {1.0}
    # Each instance is drawn as often as any other.
    rows = sum(joined.rows_per_shard[s] for s in behind)
    share = 1 - sum(behind.values()) / rows
    assert weighted.count(False) / drawn == pytest.approx(share, abs=0.1)
    metrics = run.metrics(30, seen)
    assert metrics["epoch"] == pytest.approx(30 * 8 / joined.num_rows)
    if run.config.learns:
        raw, _ = run.instance_weights() or (torch.empty(train.num_rows), None)
        assert len(raw) == train.num_rows


def test_a_baseline_measures_on_meta_questions_and_learns_from_none(make_run):
    run = make_run("--baseline", "--meta_validation_fraction", "0.4", "--rollback")
    assert run.meta_batches is None and run.validation_batches is not None
    window, meta = next(run.data())
    assert meta == []
    engine, steps = run.trainer.engine, []
    take, engine.lower_step = engine.lower_step, lambda *a: steps.append(take(*a)) or steps[-1]
    seen = run.trainer.iteration(window, meta)
    assert seen.upper is None and seen.lower.weights.eq(1).all()
    assert len(steps) == 1  # there is nothing to take again with other weights


def test_given_weights_multiply_the_losses(make_run, tmp_path: Path):
    """The same steps, bit for bit, as of a table that starts from them and stands still."""
    file = Path(distributed.broadcast_text(str(tmp_path)), "weights.parquet")
    shards = ShardFolder(os.environ["TESTS_ON_RANKS"].split(":")[1] + "/train")
    ids = torch.arange(shards.num_rows)
    weights = (ids * 0.37 % 3).float()
    if distributed.rank() == 0:
        order = ids.flip(0)
        columns = {"source_id": source_ids_of(shards), "weight": weights.tolist()}
        pq.write_table(pa.table(columns).take(pa.array(order.numpy())), file)
    distributed.barrier()
    flags = [*SETTINGS, "--activation_function", "No", "--iteration_num", "3"]
    kinds = {
        "fixed": ["--reweighter", "fixed", "--instance_weights", str(file)],
        "table": ["--initial_weights", str(file), "--meta_lr", "0"],
        "plain": ["--baseline"],
    }
    ends = {}
    for kind, of_kind in kinds.items():
        run = make_run(*flags, *of_kind)
        parameters = list(run.trainer.engine.parameters.values())
        for window, meta in run.data():
            assert bool(meta) == (kind == "table")
            if kind == "fixed":
                norm = weighted_gradient_norm(run.trainer.engine.module, window[0], weights)
            for micro_batches in window:
                seen = run.trainer.lower_step(micro_batches)
                if kind == "fixed" and micro_batches is window[0]:
                    # DeepSpeed's is a sum of float32. The weights change it by a tenth and more.
                    assert seen.gradient_norm == pytest.approx(norm, rel=1e-4)
                expected = torch.cat([weights[batch.sample_ids] for batch in micro_batches])
                assert seen.weights.equal(expected if kind != "plain" else torch.ones(2))
            if kind == "table":
                v, *_ = run.trainer.meta_gradient(meta)
                run.trainer.add_hypergradient(window[-1], v)
                assert run.trainer.reweighter.step() > 0
        ends[kind] = torch.cat([p.detach().flatten() for p in parameters]).clone()
    assert ends["fixed"].equal(ends["table"]) and not ends["fixed"].equal(ends["plain"])


def weighted_gradient_norm(prm: PRM, micro_batches: list[Batch], weights: torch.Tensor) -> float:
    """Norm of the gradient of (1/G) sum_i w_i l_i over both ranks' batches, which are equal."""
    total = torch.zeros((), dtype=torch.float64)
    for batch in micro_batches:
        losses = instance_losses(prm(batch).logits, batch)
        loss = (weights[batch.sample_ids] * losses).sum() / (2 * len(batch))
        gradients = torch.autograd.grad(loss, list(prm.parameters()))
        total = total + torch.cat([g.flatten() for g in gradients]).double()
    return float(distributed.all_reduce_sum(total).norm())


def test_losses_of_all_instances_are_exported(make_run, tmp_path: Path):
    """Those of the PRM in the export, each record on its own; of one no step is labelled.

    The meta set that has joined the training set is no part of them.
    """
    folder = Path(distributed.broadcast_text(str(tmp_path)), "run")
    flags = [*SETTINGS, "--iteration_num", "2", "--out", str(folder), "--train_on_meta", "answer"]
    make_run(*flags).train()
    distributed.barrier()
    file = folder / "export" / "instance_losses.parquet"
    assert not file.exists()
    run = make_run(*flags, "--export_losses")  # of the finished run
    run.train()
    distributed.barrier()
    found = pq.read_table(file).to_pydict()
    assert list(found) == ["sample_id", "source_id", "loss"]
    shards = run.train_shards
    assert found["sample_id"] == list(range(64)) and found["source_id"] == source_ids_of(shards)
    assert [i for i, loss in enumerate(found["loss"]) if loss is None] == [34]
    prm = load_prm(str(folder / "export"), "fp32")
    for i in range(distributed.rank(), 64, 7):
        instance = run.lower_batches.instance(i % 4, i // 4)
        batch = collate([instance], run.tokenizer.pad_token_id, share_tiles=True)
        with torch.no_grad():
            rows = prm(batch).logits.double().log_softmax(-1)
        steps = [
            -float(row[t])
            for row, t in zip(rows, batch.step_targets, strict=True)
            if t != IGNORE_INDEX
        ]
        if steps:  # a batch is padded, which turns last digits of float32
            assert found["loss"][i] == pytest.approx(sum(steps) / len(steps), rel=1e-5)


def test_negative_weights_are_said_once(make_run, caplog):
    run = make_run("--initialization", "-0.5", "--meta_lr", "0")
    for iteration, batches in enumerate(islice(run.data(), 2), start=1):
        run.metrics(iteration, run.trainer.iteration(*batches))
    assert caplog.text.count("a weight is negative") == (distributed.rank() == 0)


def test_finite_difference_in_bf16_is_warned_of(make_run, caplog):
    for flags in (["--precision", "bf16"], []):
        make_run("--hypergradient", "finite_difference", *flags)
        expected = 0 if distributed.rank() else 1
        assert caplog.text.count("error of tens of percent") == expected
