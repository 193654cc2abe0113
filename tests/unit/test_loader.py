"""Batches of whole questions, images that several instances show, and worker processes."""

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from data_tools import sharding
from data_tools.shard import shard_file
from dreamprm_dist.data.shards import ShardFolder
from dreamprm_dist.errors import InputError
from dreamprm_dist.losses import MetaLossConfig, meta_losses
from dreamprm_dist.prm.batch import Batch, InputFormat, collate
from dreamprm_dist.prm.chat import label_token_ids
from dreamprm_dist.prm.model import PRM, load_prm, load_tokenizer
from dreamprm_dist.training import loader
from dreamprm_dist.training.loader import RankBatches

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def prm(tiny_prm_dir: Path) -> PRM:
    return load_prm(str(tiny_prm_dir), "fp32").double()


def questions(shards: Path, model: Path, size: int, **place) -> RankBatches:
    """Meta batches of `size` questions."""
    prm = load_prm(str(model), "fp32")
    format = InputFormat(6, prm.tile_size, prm.tokens_per_tile)
    place = {"rank": 0, "world_size": 1} | place
    return RankBatches(
        shards=ShardFolder(shards / "meta"),
        tokenizer=load_tokenizer(str(model)),
        format=format,
        global_batch_size=size,
        micro_batch_size=size // place["world_size"],
        seed=1,
        level=1,
        by_question=True,
        **place,
    )


@pytest.fixture
def whole(tiny_shards: Path, tiny_prm_dir: Path) -> Batch:
    """Four questions."""
    (batch,) = questions(tiny_shards, tiny_prm_dir, 4)[0]
    return batch


def meta_rows(shards: Path) -> Iterator[dict]:
    folder = ShardFolder(shards / "meta")
    for shard, rows in enumerate(folder.rows_per_shard):
        yield from (folder.read(shard, row) for row in range(rows))


def test_a_question_brings_all_of_its_solutions(tiny_shards: Path, tiny_prm_dir: Path):
    group_of = {row["sample_id"]: row["group_id"] for row in meta_rows(tiny_shards)}
    members: dict[int, set[int]] = {}
    for sample_id, group in group_of.items():
        members.setdefault(group, set()).add(sample_id)
    assert sorted(map(len, members.values())) == [1] + [4] * 7
    drawn = []
    for rank in (0, 1):
        batches = questions(tiny_shards, tiny_prm_dir, 4, rank=rank, world_size=2)
        for step in (0, 1):
            (batch,) = batches[step]
            ids = batch.sample_ids.tolist()
            groups = {group_of[i] for i in ids}
            assert len(groups) == 2
            assert sorted(ids) == sorted(i for group in groups for i in members[group])
            drawn += groups
    assert sorted(drawn) == sorted(members)


def test_an_image_is_held_once_and_seen_once(whole: Batch, prm: PRM):
    tiles = []
    hook = prm.model.model.vision_tower.register_forward_pre_hook(
        lambda _, args, kwargs: tiles.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    prm(whole)
    hook.remove()
    assert tiles == [len(whole.pixel_values)]
    assert len(whole.shown_tiles) * prm.tokens_per_tile == int(
        (whole.input_ids == prm.model.config.image_token_id).sum()
    )
    assert 3 * len(whole.pixel_values) < len(whole.shown_tiles)


def test_grouped_solutions_give_the_numbers_of_ungrouped_ones(
    whole: Batch, prm: PRM, tiny_shards: Path, tiny_prm_dir: Path
):
    one_by_one = questions(tiny_shards, tiny_prm_dir, 4)
    folder = one_by_one.shards
    places = {
        folder.read(shard, row)["sample_id"]: (shard, row)
        for shard, rows in enumerate(folder.rows_per_shard)
        for row in range(rows)
    }
    apart = collate(
        [one_by_one.instance(*places[i]) for i in whole.sample_ids.tolist()],
        one_by_one.tokenizer.pad_token_id,
    )
    assert len(apart.pixel_values) == len(apart.shown_tiles) == len(whole.shown_tiles)
    label_ids = label_token_ids(one_by_one.tokenizer)

    def losses_and_gradient(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        losses = meta_losses(
            prm(batch).logits, batch.step_rows, batch.true_false, label_ids, MetaLossConfig()
        )
        gradients = torch.autograd.grad(losses.mean(), list(prm.parameters()))
        return losses.detach(), torch.cat([g.flatten() for g in gradients])

    # Sums over four copies of an image in another order, in float64.
    for grouped, ungrouped in zip(
        losses_and_gradient(whole), losses_and_gradient(apart), strict=True
    ):
        torch.testing.assert_close(grouped, ungrouped, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "signs", "said"),
    [
        ("training", ["+", "-"], None),
        ("training", ["+", None], "has no step labelled -"),
        ("training", [None, "-"], "has no step labelled +"),
        ("training", [None, None], "no step of its 2 records is labelled"),
        ("meta", [True, False], None),
        ("meta", [True, True], "has no wrong solution"),
        ("meta", [False, False], "has no right solution"),
    ],
)
@pytest.mark.usefixtures("one_rank")
def test_data_that_teach_nothing_or_one_answer(
    tmp_path: Path, tiny_prm_dir: Path, monkeypatch, caplog, kind: str, signs: list, said
):
    """On several ranks: `on_ranks/test_run.py`."""
    # Shards of another release may hold what sharding now refuses.
    monkeypatch.setattr(sharding, "_refuse_without_labels", lambda *_: None)
    records = [
        {
            "id": i,
            "conversations": [
                {"from": "human", "value": "Q"},
                {"from": "gpt", "value": None if kind == "meta" else sign},
            ],
            "true_false": bool(sign),
        }
        for i, sign in enumerate(signs)
    ]
    (tmp_path / "records.json").write_text(json.dumps(records))
    shard_file(tmp_path / "records.json", tmp_path / "shards", kind, 1)
    batches = RankBatches(
        shards=ShardFolder(tmp_path / "shards"),
        tokenizer=load_tokenizer(str(tiny_prm_dir)),
        format=InputFormat(6, 28, 4),
        global_batch_size=1,
        micro_batch_size=1,
        seed=1,
        level=0,
        rank=0,
        world_size=1,
    )
    if said and said.startswith("no step"):
        with pytest.raises(InputError, match=said):
            batches.check_rows(torch.device("cpu"))
    else:
        batches.check_rows(torch.device("cpu"))
        messages = [r.getMessage() for r in caplog.records if "one answer" in r.getMessage()]
        assert len(messages) == (said is not None) and all(str(said) in text for text in messages)


@torch.no_grad()
def test_tiles_in_the_models_dtype_give_the_same_bits(tiny_shards: Path, tiny_prm_dir: Path):
    """The model casts tiles to it first of all; so they need not travel as float32."""
    rounded = load_prm(str(tiny_prm_dir), "bf16").eval()
    batches = questions(tiny_shards, tiny_prm_dir, 2)
    ((as_float32,),) = batches.stream(0, 1, 0, CPU)
    batches.format = replace(batches.format, tile_dtype=rounded.model.dtype)
    ((as_bf16,),) = batches.stream(0, 1, 1, CPU)
    assert as_bf16.pixel_values.dtype == torch.bfloat16
    assert 2 * as_bf16.pixel_values.nbytes == as_float32.pixel_values.nbytes
    for name in (f.name for f in fields(Batch)):
        first, second = getattr(as_float32, name), getattr(as_bf16, name)
        assert (first is second is None) or torch.equal(first.to(second.dtype), second)
    for mine, theirs in zip(rounded(as_bf16), rounded(as_float32), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_a_worker_cannot_read_is_said_in_one_sentence(
    tiny_shards: Path, tiny_prm_dir: Path, num_workers: int
):
    """A worker's exception would arrive with its traceback as its message."""
    batches = questions(tiny_shards, tiny_prm_dir, 2)
    batches.format = replace(batches.format, max_length=9)
    said = (
        rf"^{batches.shards.path}: sample_id \d+ .* tokens are more than the model's context of 9;"
    )
    with pytest.raises(InputError, match=said):
        next(batches.stream(0, 1, num_workers, CPU))
    with pytest.raises(InputError, match=said):
        next(batches.every_row(num_workers, CPU))


def killed_by_a_bus_error(step: int) -> list[Batch]:
    """As a worker that writes to memory that /dev/shm turns out not to have."""
    os.kill(os.getpid(), signal.SIGBUS)
    return []


def broken(step: int) -> list[Batch]:
    raise RuntimeError(f"step {step}")


def test_a_worker_that_dies_of_a_bus_error():
    """A full /dev/shm, as containers have it: `e2e/test_bad_input.py`."""
    with pytest.raises(InputError, match=r"/dev/shm.*--shm-size.*--num_workers 0"):
        next(loader._loaded(killed_by_a_bus_error, [0], 1, CPU))
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*step 3"):  # a bug stays one
        next(loader._loaded(broken, [3], 1, CPU))
