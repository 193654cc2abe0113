"""Rows of several ranks, gathered and compared with what each rank makes again: `… LENGTH …`."""

import sys

import torch
import torch.distributed as dist

from dreamprm_dist import distributed

PIECE = 1000
lengths = [int(length) for length in sys.argv[1:]]
distributed.initialize("cpu")
distributed.ROWS_AT_ONCE = PIECE
sizes: list[int] = []
broadcast = dist.broadcast


def noted(tensor: torch.Tensor, src: int) -> None:
    sizes.append(len(tensor))
    broadcast(tensor, src)


dist.broadcast = noted  # type: ignore[assignment]
dist.send = dist.recv = None  # type: ignore[assignment]


def rows_of(rank: int) -> torch.Tensor:
    """Bits of any kind: NaNs, infinities and zeros of both signs are among them."""
    generator = torch.Generator().manual_seed(rank)
    bits = torch.randint(-(2**31), 2**31, (2 * lengths[rank],), generator=generator)
    bits[: 2 * len(special)] = torch.tensor(special).repeat_interleave(2)[: len(bits)]
    return bits.int().view(torch.float32)[::2]  # every second one: not contiguous


special = [2143289345, 2139095040, -8388608, -(2**31), 1]  # NaN, inf, -inf, -0.0, 1e-45
parts = distributed.gather_rows(rows_of(distributed.rank()))
if distributed.rank():
    assert parts is None
else:
    assert parts is not None and len(parts) == len(lengths)
    for rank, part in enumerate(parts):
        expected = rows_of(rank).contiguous()
        assert part.dtype == torch.float32 and len(part) == lengths[rank]
        assert part.view(torch.int32).equal(expected.view(torch.int32)), rank
assert max(sizes, default=0) <= PIECE and sum(sizes) == sum(lengths[1:]), sizes
distributed.shutdown()
print("done")
