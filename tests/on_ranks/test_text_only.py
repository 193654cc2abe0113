"""Records without images: what they cost where no record has one, and beside others that do."""

import json
import os
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest
import torch
from gradient_dot import gradient_dot
from torch import Tensor
from torch.func import functional_call

from data_tools.shard import shard_file
from dreamprm_dist import distributed
from dreamprm_dist.data.shards import ShardFolder
from dreamprm_dist.errors import InputError
from dreamprm_dist.losses import instance_losses
from dreamprm_dist.prm.batch import Batch
from dreamprm_dist.prm.model import PRM, StepOutput
from dreamprm_dist.training.run import TrainingRun

SETTINGS = [
    *("--batch_size", "2", "--meta_batch_size", "2", "--activation_function", "No"),
    *("--lr", "1e-3", "--scheduler_type", "constant", "--gradient_clipping", "0"),
]
GHOST = ("--hypergradient", "ghost")
# Sums in float32 in another order; what is wrong errs by 1e-3 and more.
TOLERANCE = 1e-5
IMAGE_PARTS = ("model.model.vision_tower.", "model.model.multi_modal_projector.")


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[..., str]:
    """Makes shards of the small data set's text, of which some shards keep their images."""
    usual = os.environ["TESTS_ON_RANKS"].split(":")[1]

    def make(with_images: Callable[[int], bool]) -> str:
        out = Path(distributed.broadcast_text(str(tmp_path))) / "text"
        if distributed.rank() == 0:
            out.mkdir()
            for name, kind in (("train", "training"), ("meta", "meta")):
                folder = ShardFolder(f"{usual}/{name}")
                records = []
                for shard in range(folder.num_shards):
                    rows = [folder.read(shard, i) for i in range(folder.rows_per_shard[shard])]
                    records += [(row["sample_id"], shard, row) for row in rows]
                file, written = out / f"{name}.json", []
                for _, shard, row in sorted(records, key=lambda record: record[0]):
                    kept = {"id": row["source_id"], "conversations": row["conversations"]}
                    kept |= {k: row[k] for k in ("true_false", "dataset") if k in row}
                    if with_images(shard):
                        kept["image"] = []
                        for k, data in enumerate(row["images"]):
                            image = out / f"{name}-{row['sample_id']}-{k}.png"
                            image.write_bytes(data)
                            kept["image"].append(image.name)
                    written.append(kept)
                file.write_text(json.dumps(written))
                shard_file(file, out / name, kind, folder.num_shards, progress=False)
        distributed.barrier()
        return str(out)

    return make


def calls_of_tower(run: TrainingRun) -> list[None]:
    """One more entry for each pass through the vision tower from now on."""
    calls: list[None] = []
    tower = run.trainer.engine.module.model.model.vision_tower
    tower.register_forward_hook(lambda *_: calls.append(None))
    return calls


def state_of(run: TrainingRun) -> list[Tensor]:
    """All that ZeRO holds on this rank."""
    snapshot = run.trainer.engine.zero.snapshot()
    moments = chain.from_iterable(state.values() for state in snapshot.optimizer)
    return [*snapshot.parameters, *snapshot.partitions, *moments]


@pytest.mark.parametrize(
    "flags",
    [
        (*GHOST, "--unroll_steps", "2", "--unroll_window", "all", "--gradient_accumulation", "2"),
        (*GHOST, "--precision", "bf16", "--strategy", "zero2", "--precondition", "adam"),
        (*GHOST, "--strategy", "zero1", "--gradient_checkpointing"),
        ("--hypergradient", "finite_difference", "--strategy", "zero2_offload"),
        ("--reweighter", "instance_net", "--activation_function", "sigmoid", "--rollback"),
    ],
    ids=" ".join,
)
def test_a_run_of_text_alone_runs_no_vision_tower(
    make_run, make_shards, monkeypatch, flags: tuple[str, ...]
):
    """And is to the bit the run in which a blank image stands in for images."""
    shards, seen = make_shards(lambda shard: False), {}
    for blank in (True, False):
        with monkeypatch.context() as patched:
            if blank:
                patched.setattr(PRM, "see_no_images", lambda prm: None)
            run = make_run(*SETTINGS, *flags, shards=shards)
        before, calls = state_of(run), calls_of_tower(run)
        data = run.data()
        metrics = [run.metrics(i, run.trainer.iteration(*next(data))) for i in (1, 2)]
        _, weights = run.instance_weights() or (None, torch.zeros(0))
        assert bool(calls) == blank
        losses = [torch.tensor(m[name]) for m in metrics for name in ("lower_loss", "meta_loss")]
        after = state_of(run)
        seen[blank] = [*after, *losses, weights]
        assert any(not a.equal(b) for a, b in zip(before, after, strict=True))
    assert len(seen[True]) == len(seen[False])
    assert all(a.equal(b) for a, b in zip(seen[True], seen[False], strict=True))


def gradient_of(run: TrainingRun, losses: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
    """The gradient of the sum of losses by all parameters, without a blank image."""
    parameters = run.trainer.engine.parameters
    values = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
    found = torch.autograd.grad(losses(values).sum(), values.values(), allow_unused=True)
    return torch.cat(
        [
            torch.zeros_like(p).flatten() if g is None else g.flatten()
            for g, p in zip(found, values.values(), strict=True)
        ]
    )


def without_blank(run: TrainingRun, values: dict[str, Tensor], batch: Batch) -> StepOutput:
    """What the PRM says with these parameters where no blank image stands in for images."""
    prm = run.trainer.engine.module
    output = functional_call(prm.eval(), values, (batch,))
    prm.train()
    return output


def lower_losses(run: TrainingRun, batch: Batch) -> Callable[[dict[str, Tensor]], Tensor]:
    """From parameters to the instance losses of a batch."""
    return lambda values: instance_losses(without_blank(run, values, batch).logits, batch)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).double().norm() / b.double().norm())


@pytest.mark.parametrize("estimator", ["ghost", "jvp", "finite_difference"])
def test_a_rank_without_images_beside_one_that_has_some(make_run, make_shards, estimator: str):
    """At both levels: v and the gradient are means over the ranks, products their own."""
    shards = make_shards(lambda shard: shard % 2 == 1)
    run = make_run(*SETTINGS, "--hypergradient", estimator, shards=shards)
    trainer = run.trainer
    ((micro_batches,), meta) = next(run.data())
    (batch,), (meta_batch,) = micro_batches, meta
    shown = [b.pixel_values is not None for b in (batch, meta_batch)]
    assert shown == [distributed.rank() == 1] * 2

    def upper(values: dict[str, Tensor]) -> Tensor:
        return trainer.meta_losses(without_blank(run, values, meta_batch), meta_batch)

    expected = distributed.all_reduce_sum(gradient_of(run, upper)) / 4  # two each
    v, *_ = trainer.meta_gradient(meta)
    flat = torch.cat([t.flatten() for t in v.values()])
    assert relative(flat, expected) < TOLERANCE
    starts = {name for name, t in v.items() if t.any()}
    assert any(name.startswith(IMAGE_PARTS) for name in starts)  # of the other rank's images

    values = {n: p.detach().clone().requires_grad_() for n, p in trainer.engine.parameters.items()}
    truth = gradient_dot(lower_losses(run, batch)(values), values, v)
    calls = calls_of_tower(run)
    if estimator == "ghost":
        products = trainer.lower_step(micro_batches, v).products
        assert len(calls) == 1  # a blank image, for ZeRO
    else:
        products = trainer.directional_derivative(batch, v)[1].losses
        assert bool(calls) == shown[0]
    # A step of 0.01 in float32 keeps four digits of a difference of losses.
    assert relative(products, truth) < (2e-2 if estimator == "finite_difference" else TOLERANCE)


def test_the_lower_gradient_is_the_mean_over_ranks_with_and_without_images(make_run, make_shards):
    """By the parameters' first moments: each rank holds those of its partition."""
    run = make_run(*SETTINGS, "--baseline", shards=make_shards(lambda shard: shard % 2 == 0))
    ((micro_batches,), _) = next(run.data())
    (batch,), engine = micro_batches, run.trainer.engine

    expected = distributed.all_reduce_sum(gradient_of(run, lower_losses(run, batch))) / 4
    assert run.trainer.lower_step(micro_batches).applied
    place, seen = 0, 0
    for p in engine.parameters.values():
        part = expected[place : place + p.numel()]
        place += p.numel()
        if (fragment := engine.zero.fragment(p)) is not None:
            moments = engine.zero.optimizer.state[fragment.partition]["exp_avg"][fragment.place]
            # One step of Adam with a first beta of 0.9.
            torch.testing.assert_close(moments / 0.1, part[fragment.within], rtol=1e-3, atol=1e-7)
            seen += moments.numel()
    assert seen and place == len(expected)


def test_text_alone_teaches_nothing_where_the_language_model_is_frozen(make_run, make_shards):
    shards = make_shards(lambda shard: False)
    with pytest.raises(InputError, match="no record has an image, and the language model is froz"):
        make_run(*SETTINGS, "--freeze_language_model", shards=shards)
