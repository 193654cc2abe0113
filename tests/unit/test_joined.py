"""The meta set as part of the training data: every row once, on its rank, at weight 1."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from reweighting import batch_of, reweighter_of

from dreamprm_dist.data.joined import NO_ROW, JoinedRows
from dreamprm_dist.data.schema import step_labels
from dreamprm_dist.data.shards import ShardFolder
from dreamprm_dist.losses import Observation
from dreamprm_dist.reweighters import REWEIGHTERS


class Rows(SimpleNamespace):
    """Rows of each shard without a file."""

    def __init__(self, rows_per_shard: list[int], **columns):
        super().__init__(path=Path("rows"), kind="training", rows_per_shard=rows_per_shard)
        self.num_shards, self.num_rows = len(rows_per_shard), sum(rows_per_shard)
        self.columns = {"source_id": "s", "true_false": True} | columns

    def read_column(self, shard: int, name: str) -> list:
        if name == "source_id":
            return [(shard, row) for row in range(self.rows_per_shard[shard])]
        return [self.columns[name]] * self.rows_per_shard[shard]


def turns(*labels: str | None) -> list[dict]:
    return [turn for label in labels for turn in ({"from": "human", "value": "a step"},
                                                  {"from": "gpt", "value": label})]  # fmt: skip


@pytest.mark.parametrize(("num_train", "num_meta"), [(8, 8), (8, 4), (4, 8), (12, 8), (6, 1)])
def test_every_meta_row_is_dealt_once_and_stays_on_its_rank(num_train: int, num_meta: int):
    train = Rows([5] * num_train)
    meta = Rows([3 + shard % 2 for shard in range(num_meta)], conversations=turns("+"))
    joined = JoinedRows(train, meta, "steps")
    found = [joined.read_column(shard, "source_id")[5:] for shard in range(num_train)]
    dealt = sorted(place for part in found for place in part)
    everything = [(shard, row) for shard, rows in enumerate(meta.rows_per_shard)
                  for row in range(rows)]  # fmt: skip
    assert dealt == everything
    assert joined.num_rows == 5 * num_train + len(everything) == sum(joined.rows_per_shard)
    for ranks in range(1, 9):
        if num_train % ranks == num_meta % ranks == 0:
            for shard, part in enumerate(found):
                assert {place[0] % ranks for place in part} <= {shard % ranks}
    if num_meta % num_train == 0 or num_train % num_meta == 0:
        sizes = [len(part) for part in found]
        assert max(sizes) - min(sizes) <= max(meta.rows_per_shard) - min(meta.rows_per_shard) + 1


@pytest.mark.parametrize("labels", ["steps", "answer"])
def test_rows_and_columns_are_those_of_the_two_folders(tiny_shards: Path, labels: str):
    train, meta = (ShardFolder(tiny_shards / kind) for kind in ("train", "meta"))
    joined = JoinedRows(train, meta, labels)
    left = [
        meta.read(shard, row)
        for shard in range(meta.num_shards)
        for row in range(meta.rows_per_shard[shard])
    ]
    for shard in range(train.num_shards):
        rows = [joined.read(shard, row) for row in range(joined.rows_per_shard[shard])]
        for name in ("sample_id", "source_id", "dataset", "conversations", "image_sizes"):
            assert joined.read_column(shard, name) == [row[name] for row in rows]
        of_train = train.rows_per_shard[shard]
        assert rows[:of_train] == [train.read(shard, row) for row in range(of_train)]
        for row in rows[of_train:]:
            assert row["sample_id"] == NO_ROW
            same = ("source_id", "response", "true_false", "images")
            record = next(r for r in left if all(r[key] == row[key] for key in same))
            left.remove(record)
            given, found = (step_labels(r["conversations"]) for r in (record, row))
            last = "+" if record["true_false"] else "-"
            assert found == (given if labels == "steps" else [None] * (len(given) - 1) + [last])
    assert not left


@pytest.mark.parametrize(
    ("labels", "right", "message"),
    [
        (("+", "+"), False, r"every label is \+, so that its labels are placeholders"),
        ((None, None), True, "no step of its 2 solutions is labelled"),
    ],
)
def test_placeholders_are_no_labels(labels: tuple, right: bool, message: str):
    meta = Rows([2], conversations=turns(*labels), true_false=right)
    with pytest.raises(ValueError, match=message) as error:
        JoinedRows(Rows([2]), meta, "steps")
    assert "--train_on_meta answer" in str(error.value)
    joined = JoinedRows(Rows([2], conversations=turns("-")), meta, "answer")
    (found,) = {tuple(step_labels(t)) for t in joined.read_column(0, "conversations")[2:]}
    assert found == (None, "+" if right else "-")


def test_placeholders_of_a_right_solution_are_labels():
    meta = Rows([2], conversations=turns("+", "+"))
    assert JoinedRows(Rows([2]), meta, "steps").num_rows == 4


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("name", [name for name, kind in REWEIGHTERS.items() if kind.learns])
def test_instances_of_the_meta_set_weigh_1_and_move_nothing(name: str):
    """A batch with two of them takes the upper step of the batch without, of the same G."""
    ids, alone = torch.tensor([NO_ROW, 2, 1, NO_ROW]), torch.tensor([2, 1])
    derivatives = torch.tensor([7.0, 0.5, -2.0, 3.0])
    features = torch.tensor([[4.0], [0.1], [2.0], [-3.0]])
    learned = ids >= 0
    states = []
    for batch, mask in ((batch_of(ids), torch.ones(4) > 0), (batch_of(alone), learned)):
        weights = reweighter_of(
            *([2, 2],),
            **{"reweighter": name, "instance_net_input": "loss", "initialization": 0.4},
            **{"row_update": "normalized_sgd", "meta_weight_decay": 0.1, "meta_lr": 0.2},
            **{"meta_scheduler_type": "constant"},
        )
        found = weights.weights(batch, features[mask])
        if name != "domain_table":  # whose weights have a mean of 1
            assert (found[batch.weighted] < 0.7).all()
        assert found[~batch.weighted].eq(1).all()
        nothing = Observation(torch.zeros(len(batch)), torch.zeros(0, 0))
        values = nothing._replace(features=features[mask])
        weights.add_hypergradient(
            batch, values, Observation(derivatives[mask], torch.zeros_like(features[mask])), 4
        )
        weights.step()
        states.append({key: value.clone() for key, value in weights.state_dict().items()}
                      | {"mean": torch.tensor(weights.statistics()["mean"])})  # fmt: skip
    mixed, plain = states
    assert mixed.keys() == plain.keys()
    for key, value in mixed.items():
        torch.testing.assert_close(value, plain[key], rtol=1e-6, atol=0)
