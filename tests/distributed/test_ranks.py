"""Ranks that meet, each with its GPU, and rows that they give to the first one."""

from pathlib import Path

import pytest
from started_run import started_ranks

HERE = Path(__file__).parent
STARTED = "nccl on cuda:{0}, as cuda:{0}, TF32 False"


def said(worker: str, *arguments: object, world_size: int) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each rank."""
    with started_ranks(HERE / worker, *arguments, world_size=world_size) as ranks:
        texts = [process.communicate(timeout=240) for process in ranks]
        return [(p.returncode, *text) for p, text in zip(ranks, texts, strict=True)]


@pytest.mark.parametrize("lengths", [(2500,), (5, 3001), (2000, 0, 1000), (0, 1, 999)], ids=str)
def test_rows_come_to_rank_0_bit_for_bit_in_pieces(lengths: tuple[int, ...]):
    for code, out, error in said("gather_worker.py", *lengths, world_size=len(lengths)):
        assert (code, out) == (0, "done\n"), error


@pytest.mark.parametrize(
    ("device", "gpus", "ends"),
    [
        ("auto", ("AB", "AB"), [STARTED.format(0), STARTED.format(1)]),
        ("cuda", ("A", "B"), [STARTED.format(0)] * 2),
        # What CUDA_VISIBLE_DEVICES=0 leaves to both ranks of a machine.
        ("auto", ("A", "A"), ["rank 1 has no GPU: the 1 that it sees on "] * 2),
        ("auto", ("A", ""), ["rank 1 finds no GPU on "] * 2),
        ("cuda", ("", ""), ["rank 0 finds no GPU on "] * 2),
    ],
)
def test_all_ranks_know_the_gpus_of_all(device: str, gpus: tuple[str, ...], ends: list[str]):
    for (code, _, error), end in zip(
        said("meeting_worker.py", device, *gpus, world_size=2), ends, strict=True
    ):
        assert code == 1 and error.startswith(end), error
