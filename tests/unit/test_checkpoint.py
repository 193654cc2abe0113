"""What makes a checkpoint whole, which are kept, and what is found to be damaged; on one rank."""

import json
from pathlib import Path

import pytest
import torch

from dreamprm_dist.training.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from dreamprm_dist.training.checkpoint_files import MANIFEST
from dreamprm_dist.training.metrics import truncate

pytestmark = pytest.mark.usefixtures("one_rank")


class Part:
    """Stands for the engine and for the reweighter: one number in each."""

    device = torch.device("cpu")
    value = 0.0

    def save(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "value.txt").write_text(str(self.value))

    def load(self, folder: Path) -> None:
        self.value = float((folder / "value.txt").read_text())

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"value": torch.tensor(self.value)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.value = float(state["value"])


def save(run: Path, iteration: int, keep_last: int = 2, **more: float) -> None:
    engine, reweighter = Part(), Part()
    engine.value, reweighter.value = iteration, -iteration
    keep_best = more.pop("keep_best", 0)
    state = {"iteration": iteration, "settings": {"lr": 0.1}} | more
    save_checkpoint(run, state, engine, reweighter, keep_last=keep_last, keep_best=keep_best)


def names(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").iterdir()}


def test_the_newest_are_kept_and_loaded(tmp_path: Path):
    for iteration in (8, 9, 10):  # by number, not by name
        torch.manual_seed(iteration)
        save(tmp_path, iteration)
    assert names(tmp_path) == {"iteration-9", "iteration-10"}
    expected = torch.rand(3)
    torch.manual_seed(0)
    engine, reweighter = Part(), Part()
    load_checkpoint(newest_checkpoint(tmp_path), engine, reweighter)
    assert (engine.value, reweighter.value) == (10, -10)
    assert torch.equal(torch.rand(3), expected)


def test_the_best_stay_beside_the_newest(tmp_path: Path):
    for iteration, loss in enumerate((0.3, 0.1, 0.2, 0.4, 0.5, float("nan")), start=1):
        save(tmp_path, iteration, keep_best=2, meta_validation_loss=loss)
    assert names(tmp_path) == {f"iteration-{i}" for i in (2, 3, 5, 6)}


def test_a_save_that_was_cut_short_is_not_seen_and_cleared_away(tmp_path: Path):
    assert newest_checkpoint(tmp_path) is None
    save(tmp_path, 1)
    half = tmp_path / "checkpoints" / "iteration-2.new"
    half.mkdir()
    (half / MANIFEST).write_text("{}")
    assert newest_checkpoint(tmp_path).iteration == 1
    save(tmp_path, 2)
    assert names(tmp_path) == {"iteration-1", "iteration-2"}


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "checksum of deepspeed/value.txt": lambda path: flip(path / "deepspeed" / "value.txt"),
    "checksum of state.json": lambda path: flip(path / "state.json"),
    "rank-0.safetensors is missing": lambda path: (path / "rank-0.safetensors").unlink(),
    "more.pt is not of it": lambda path: (path / "more.pt").write_bytes(b""),
    "manifest.json cannot be read": lambda path: (path / MANIFEST).write_text('{"format'),
    "(KeyError: 'files')": lambda path: (path / MANIFEST).write_text("{}"),
    "format_version 9 is unknown": lambda path: (path / MANIFEST).write_text(
        json.dumps(json.loads((path / MANIFEST).read_text()) | {"format_version": 9})
    ),
}


@pytest.mark.parametrize("problem", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_loudly_and_replaced(tmp_path: Path, problem, caplog):
    for iteration in (1, 2, 3):
        save(tmp_path, iteration, keep_last=3)
    for iteration in (2, 3):
        DAMAGES[problem](tmp_path / "checkpoints" / f"iteration-{iteration}")
    assert newest_checkpoint(tmp_path).iteration == 1
    said = caplog.text
    assert "iteration-3 is damaged and skipped" in said and problem in said
    save(tmp_path, 2)
    assert newest_checkpoint(tmp_path).iteration == 2
    assert names(tmp_path) == {"iteration-1", "iteration-2"}


def test_only_damaged_checkpoints_are_an_error(tmp_path: Path):
    save(tmp_path, 1)
    flip(tmp_path / "checkpoints" / "iteration-1" / "state.json")
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole"):
        newest_checkpoint(tmp_path)


def test_metrics_are_cut_back_to_an_iteration_and_to_whole_lines(tmp_path: Path):
    file = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"iteration": i}) + "\n" for i in (2, 4, 6)]
    file.write_text("".join(lines) + '{"iterat')
    truncate(file, 100)
    assert file.read_text() == "".join(lines)
    truncate(file, 5)
    assert file.read_text() == "".join(lines[:2])
