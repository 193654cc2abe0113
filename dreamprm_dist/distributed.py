"""Start-up under every launcher, and the collectives by name: the only user of torch.distributed.

Rank and world size come from the environment that the launcher left: deepspeed and torchrun set
RANK, WORLD_SIZE and LOCAL_RANK; srun and mpirun set their own, which are translated. Without any,
the run has one rank.
"""

import os
import socket
from collections.abc import Iterable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

_translated = False  # the variables are ours and not a launcher's


def initialize(device: str = "auto") -> torch.device:
    """Join the process group and choose this rank's device.

    Args:
        device: auto | cuda | cpu.

    Raises:
        ValueError: cuda is asked for, or more ranks than GPUs are started, and it is not there.
    """
    _adopt_launcher_environment()
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    local_rank = int(os.environ["LOCAL_RANK"])
    if use_cuda:
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise ValueError(
                f"local rank {local_rank} has no GPU: this machine shows {count}; start at most "
                f"{count} ranks on it, or use --device cpu"
            )
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if use_cuda else "gloo", timeout=COLLECTIVE_TIMEOUT)
    return torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")


def _adopt_launcher_environment() -> None:
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        env.setdefault("LOCAL_RANK", env["RANK"])
    elif "OMPI_COMM_WORLD_RANK" in env or "PMI_RANK" in env:
        # mpi4py initialises MPI on import, which only a process that mpirun started should do.
        from mpi4py import MPI

        world = MPI.COMM_WORLD
        local = world.Split_type(MPI.COMM_TYPE_SHARED)
        address = world.bcast(socket.gethostbyname(socket.gethostname()), root=0)
        port = world.bcast(_free_port(), root=0)
        _set_ranks(world.rank, world.size, local.rank, address, port)
    elif int(env.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in env:
        missing = {"MASTER_ADDR", "MASTER_PORT"} - env.keys()
        if missing:
            raise ValueError(
                f"srun started {env['SLURM_NTASKS']} tasks without {' and '.join(sorted(missing))}"
                "; export the first node's name and a free port under these names before srun"
            )
        _set_ranks(
            int(env["SLURM_PROCID"]),
            int(env["SLURM_NTASKS"]),
            int(env["SLURM_LOCALID"]),
            env["MASTER_ADDR"],
            int(env["MASTER_PORT"]),
        )
    else:
        _set_ranks(0, 1, 0, "127.0.0.1", _free_port())


def _set_ranks(*values: int | str) -> None:
    global _translated
    _translated = True
    os.environ.update(zip(RANK_VARIABLES, map(str, values), strict=True))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def shutdown() -> None:
    """Leave the process group, and take back what was written into the environment."""
    global _translated
    if dist.is_initialized():
        dist.destroy_process_group()
    if _translated:
        for name in RANK_VARIABLES:
            os.environ.pop(name, None)
        _translated = False


def rank() -> int:
    return dist.get_rank()


def world_size() -> int:
    return dist.get_world_size()


def barrier() -> None:
    dist.barrier()


def all_reduce_mean(tensors: Sequence[Tensor], bucket_bytes: int = 256 * 2**20) -> None:
    """Average tensors of one dtype over all ranks in place, in flat buckets."""
    # Dividing first keeps sums of many ranks within the range of bf16 and fp16 gradients.
    _all_reduce_in_place(tensors, bucket_bytes, divisor=world_size())


def all_reduce_fragments(tensors: Sequence[Tensor], bucket_bytes: int = 256 * 2**20) -> None:
    """Put tensors together of which each element is set on one rank and 0 on the others."""
    _all_reduce_in_place(tensors, bucket_bytes, divisor=1)


def _all_reduce_in_place(tensors: Sequence[Tensor], bucket_bytes: int, divisor: int) -> None:
    if world_size() == 1:
        return
    for bucket in _buckets(tensors, bucket_bytes):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        flat.div_(divisor)
        dist.all_reduce(flat)
        for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))


def _buckets(tensors: Iterable[Tensor], bucket_bytes: int) -> Iterable[list[Tensor]]:
    bucket, size = [], 0
    for tensor in tensors:
        bucket.append(tensor)
        size += tensor.numel() * tensor.element_size()
        if size >= bucket_bytes:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum of a small tensor over all ranks, the same on each of them."""
    total = values.clone()
    dist.all_reduce(total)
    return total


def all_reduce_max(values: Tensor) -> Tensor:
    """The elementwise maximum of a small tensor over all ranks."""
    largest = values.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


def gather_rows(rows: Tensor) -> list[Tensor] | None:
    """Every rank's 1-D tensor, in rank order, on rank 0; None elsewhere. Lengths may differ."""
    counts = torch.zeros(world_size(), dtype=torch.int64, device=rows.device)
    counts[rank()] = len(rows)
    counts = all_reduce_sum(counts).tolist()
    if rank():
        dist.send(rows.contiguous(), dst=0)
        return None
    parts = [rows]
    for source, count in enumerate(counts[1:], start=1):
        part = torch.empty(count, dtype=rows.dtype, device=rows.device)
        dist.recv(part, src=source)
        parts.append(part)
    return parts


def all_gather_texts(text: str) -> list[str]:
    """Every rank's text, in rank order, on every rank."""
    texts = [""] * world_size()
    dist.all_gather_object(texts, text)
    return texts


def broadcast_text(text: str) -> str:
    """Rank 0's text on every rank."""
    box = [text]
    dist.broadcast_object_list(box, src=0)
    return box[0]
