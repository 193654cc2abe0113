"""What training makes of roll-outs on the way from shards to batches."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from reweighting import rank_batches

from data_tools.convert import main as convert
from data_tools.shard import shard_file
from dreamprm_dist.data.schema import relabelled, step_labels
from dreamprm_dist.errors import InputError
from dreamprm_dist.losses import LowerLossConfig
from dreamprm_dist.planning.iteration import count_iteration
from dreamprm_dist.planning.workload import Workload
from dreamprm_dist.prm.batch import Batch, InputFormat
from dreamprm_dist.prm.chat import label_token_ids
from dreamprm_dist.prm.model import load_tokenizer
from dreamprm_dist.training.config import parse_train_config
from dreamprm_dist.training.loader import RankBatches

COUNTS = [(3, 4), (1, 4), (2, 4), (0, 4), (4, 4), (0, 0)]
THRESHOLDS = [0.0, 0.25, 0.5, 0.9]


def gpt(label: str | None, correct: int = 0, total: int = 0) -> dict:
    counts = {"num_mc_correct": correct, "num_mc_total": total} if total else {}
    return {"from": "gpt", "value": label} | counts


def batches(
    folder: Path, model: Path, labels: LowerLossConfig | None = None, context: str = "data"
) -> RankBatches:
    format = InputFormat(6, 28, 4, label_context=context)
    return rank_batches(folder, load_tokenizer(str(model)), format, 2, labels=labels)


def test_steps_are_labelled_anew():
    turns = [gpt("+", 1, 4), gpt("-", 4, 4), gpt("-"), gpt("+"), gpt(None), gpt(None, 4, 4)]
    assert step_labels(relabelled(turns, 0.25)) == ["-", "+", "-", "+", None, None]
    assert step_labels(relabelled(turns, 0.2)) == ["+", "+", "-", "+", None, None]
    assert turns[0] == gpt("+", 1, 4) and relabelled(turns, 0.25)[0] == gpt("-", 1, 4)


def test_a_threshold_is_that_of_the_conversion(tmp_path: Path, tiny_prm_dir: Path):
    """Labels and what the context shows of them; and roll-outs reach the batch."""

    def raw(counts: list[tuple[int, int]]) -> dict:
        steps = [
            {"step": f"s{i}", "score": k / max(n, 1), "num_mc_correct": k, "num_mc_total": n}
            for i, (k, n) in enumerate(counts)
        ]
        return {"question": "How many?", "steps_with_score": steps}

    source = tmp_path / "raw.jsonl"
    records = [raw(COUNTS), raw(COUNTS[::-1])]
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    folders = {}
    for threshold in THRESHOLDS:
        out = tmp_path / f"{threshold}.jsonl"
        convert(["raw", str(source), "--out", str(out), "--threshold", str(threshold)])
        folders[threshold] = tmp_path / f"shards-{threshold}"
        shard_file(out, folders[threshold], "training", 1)

    def batch(folder: Path, **labels: float) -> Batch:
        config = LowerLossConfig(**labels) if labels else None
        (found,) = batches(folder, tiny_prm_dir, config)[0]
        return found

    seen = set()
    for threshold in THRESHOLDS:
        expected = batch(folders[threshold])
        found = batch(folders[0.0], label_threshold=threshold)
        for field in dataclasses.fields(Batch):
            one, other = getattr(found, field.name), getattr(expected, field.name)
            assert one is other is None or torch.equal(one, other), field.name
        seen.add(tuple(found.input_ids.flatten().tolist()))
    assert len(seen) == len(THRESHOLDS)
    rows = [found.step_counts[found.step_rows == row].tolist() for row in range(2)]
    order = [COUNTS, COUNTS[::-1]]
    assert [[tuple(c) for c in rows[i]] for i in found.sample_ids.argsort()] == order
    plus = label_token_ids(load_tokenizer(str(tiny_prm_dir)))["+"]
    targets = found.step_targets == plus
    assert torch.equal(targets, found.step_counts[:, 0] == 4)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({}, None),
        ({"negative_weight": 2.0}, None),
        ({"label": "soft"}, "label soft"),
        ({"label_threshold": 0.0}, "label_threshold"),
        ({"step_loss": "beta_binomial"}, "step_loss beta_binomial"),
    ],
)
@pytest.mark.usefixtures("one_rank")
def test_roll_outs_that_are_needed_must_be_there(
    tmp_path: Path, tiny_prm_dir: Path, caplog, flags: dict, named: str | None
):
    """Those of a step without a label are of no use; on several ranks: `on_ranks/test_run.py`."""
    device = torch.device("cpu")
    for name, steps in {
        "without": [gpt("+"), gpt("-"), gpt(None, 1, 2)],
        "with": [gpt("+", 1, 2)],
    }.items():
        record = {"conversations": [{"from": "human", "value": "Q"}, *steps]}
        (tmp_path / f"{name}.json").write_text(json.dumps([record]))
        shard_file(tmp_path / f"{name}.json", tmp_path / name, "training", 1)
    without, with_counts = (
        batches(tmp_path / name, tiny_prm_dir, LowerLossConfig(**flags))
        for name in ("without", "with")
    )
    if named:
        with pytest.raises(InputError, match=rf"without: {named} needs roll-outs, but no labelled"):
            without.check_rows(device)
    else:
        without.check_rows(device)
    caplog.clear()
    with_counts.check_rows(device)
    both = named in ("label soft", "step_loss beta_binomial")
    assert ("has no step labelled -:" in caplog.text) == (not both)


def test_runs_of_every_loss_are_planned(tiny_prm_dir: Path):
    work = Workload(tiles=1, text_tokens=20, steps=3)

    def flops(*flags: str) -> dict[str, int]:
        settings = ["--reward_model", str(tiny_prm_dir), "--precision", "fp32", *flags]
        return dict(count_iteration(parse_train_config(settings), work, 2).flops)

    plain = flops()
    for flags in (
        ("--label", "soft"),
        ("--step_loss", "beta_binomial"),
        ("--negative_weight", "2", "--label_threshold", "0.5"),
    ):
        assert flops(*flags) == plain  # products of matrices: none is in the loss
