"""Start-up under every launcher, and the collectives by name: the only user of torch.distributed.

Ranks and the first one's address come from the environment that the launcher left: deepspeed and
torchrun set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; what srun and mpirun set is
translated into these, where the last two may be given. Without any, the run has one rank.
"""

import contextlib
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dreamprm_dist import files
from dreamprm_dist.errors import InputError, report_error, start_logging

JOIN_TIMEOUT = timedelta(minutes=10)
BUCKET_BYTES = 256 * 2**20
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

_before: dict[str, str | None] = {}  # what the environment had where we have set a variable
_roll_call: dist.ProcessGroup | None = None  # nothing else uses it, so nothing has failed on it
_store: dist.Store | None = None  # where the ranks have met


class RankLostError(ConnectionError):
    """A rank hangs or has ended while others wait for it."""


def initialize(device: str = "auto", timeout_minutes: float = 30.0) -> torch.device:
    """Join the process group and choose this rank's device.

    Args:
        device: auto | cuda | cpu.
        timeout_minutes: how long a collective waits for a rank.

    Raises:
        InputError: cuda is asked for, or more ranks than GPUs are started, and it is not there; or
            the environment contradicts itself about the ranks.
    """
    global _roll_call, _store
    _adopt_launcher_environment()
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    local_rank = int(os.environ["LOCAL_RANK"])
    if use_cuda:
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise InputError(
                f"local rank {local_rank} has no GPU: this machine shows {count}; start at most "
                f"{count} ranks on it, or use --device cpu"
            )
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        timeout = timedelta(minutes=timeout_minutes)
        _store, rank, world_size = _meet(max(timeout, JOIN_TIMEOUT))
        # DeepSpeed makes groups of its own, with torch's default.
        dist.distributed_c10d.default_pg_timeout = timeout
        dist.distributed_c10d.default_pg_nccl_timeout = timeout
        dist.init_process_group(
            "nccl" if use_cuda else "gloo",
            timeout=timeout,
            store=_store,
            rank=rank,
            world_size=world_size,
        )
        _roll_call = dist.new_group(backend="gloo", timeout=timeout)
        start_logging(rank)
    return torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")


def _meet(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """Wait until all ranks are there: they do not start at once, and collectives wait for less."""
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    store.set(f"here/{rank}", "")
    store.wait([f"here/{other}" for other in range(world_size)], timeout)
    return store, rank, world_size


@contextlib.contextmanager
def naming_lost_ranks() -> Iterator[None]:
    """Within the block a collective of gloo that a rank did not come to fails with its name.

    Of NCCL's collectives its own watchdog ends a rank that has waited too long.

    Raises:
        RankLostError: in place of the collective's own error.
    """
    try:
        yield
    except RuntimeError as error:
        if _roll_call is None or "gloo" not in str(error):
            raise
        timeout = dist.distributed_c10d.default_pg_timeout
        patience = min(timeout, timedelta(minutes=1))
        if "imed out" not in str(error):  # a lost connection: others wait out their timeout first
            patience += timeout
        raise RankLostError(
            f"rank {rank()} waited for the others in vain: {_absent(patience)}; look at that "
            "rank's log and machine, then start again to go on from what was saved"
        ) from error


def _absent(patience: timedelta) -> str:
    """Name the ranks that do not answer: rank 0 waits for a sign of each, these for its reply."""
    end = time.monotonic() + patience.total_seconds()

    def wait(message: dist.Work | None) -> None:
        assert message is not None  # this rank is in the group
        message.wait(timedelta(seconds=max(end - time.monotonic(), 0.001)))  # 0 would have no end

    if rank():
        try:
            wait(dist.isend(torch.zeros(1), 0, _roll_call))
            wait(dist.irecv(torch.zeros(1), 0, _roll_call))
        except RuntimeError:
            return "rank 0 does not answer, or has ended since another one does not"
    else:
        missing, signs = [], {}
        for other in range(1, world_size()):
            try:
                signs[other] = dist.irecv(torch.zeros(1), other, _roll_call)
            except RuntimeError:
                missing.append(other)
        for other, sign in signs.items():
            try:
                wait(sign)
            except RuntimeError:
                missing.append(other)
        if missing:
            return f"rank {', '.join(map(str, sorted(missing)))} does not answer"
        for other in signs:
            dist.send(torch.zeros(1), other, _roll_call)
    return "all answer now, so one was too slow for collective_timeout"


def _adopt_launcher_environment() -> None:
    """Have the variables of `RANK_VARIABLES` in the environment, whatever started this process."""
    env, started = os.environ, _started(os.environ)
    if "RANK" in env or "WORLD_SIZE" in env:
        _check_ranks(env, started)
        env.setdefault("LOCAL_RANK", env["RANK"])
    elif started is None or started.world_size == 1:
        _set_ranks(0, 1, 0, "127.0.0.1", _free_port())
    elif started.launcher == "mpirun":
        # mpi4py initialises MPI on import, which only a process that mpirun started should do.
        from mpi4py import MPI

        world = MPI.COMM_WORLD
        local = world.Split_type(MPI.COMM_TYPE_SHARED)
        address = env.get("MASTER_ADDR") or socket.gethostbyname(socket.gethostname())
        address, port = world.bcast((address, env.get("MASTER_PORT", _free_port())), root=0)
        _set_ranks(world.rank, world.size, local.rank, address, port)
    else:
        # A port that all tasks name without asking each other, apart from other jobs' ports.
        port = env.get("MASTER_PORT", 15000 + int(env["SLURM_JOB_ID"]) % 15000)
        address = env.get("MASTER_ADDR") or first_host(env["SLURM_STEP_NODELIST"])
        _set_ranks(started.rank, started.world_size, int(env["SLURM_LOCALID"]), address, port)


class Started(NamedTuple):
    """This process as mpirun or srun describe it.

    Attributes:
        launcher: "mpirun" or "srun".
        rank, world_size: this process's number, and how many processes were started.
    """

    launcher: str
    rank: int
    world_size: int


def _started(env: Mapping[str, str]) -> Started | None:
    # Open MPI's processes also have the variables of srun, which has started its daemons. A batch
    # script has SLURM_PROCID, but is no step.
    for launcher, rank, size in (
        ("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
        ("mpirun", "PMI_RANK", "PMI_SIZE"),
    ):
        if rank in env and size in env:
            return Started(launcher, int(env[rank]), int(env[size]))
    return None


def _check_ranks(env: Mapping[str, str], started: Started | None) -> None:
    """RANK and WORLD_SIZE are whole, and not another launcher's leftovers."""
    for name, other in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        if name not in env:
            raise InputError(f"{other} is set, but {name} is not; set both, or unset it")
    rank, size = int(env["RANK"]), int(env["WORLD_SIZE"])
    if not 0 <= rank < size:
        raise InputError(f"RANK is {rank} and WORLD_SIZE {size}; ranks count from 0 to {size - 1}")
    # torchrun and deepspeed may be started once per node by srun or mpirun, and then count anew.
    counted_anew = {"TORCHELASTIC_RUN_ID", "CROSS_RANK"} & env.keys()
    if started and started.world_size > 1 and not counted_anew and started[1:] != (rank, size):
        raise InputError(
            f"{started.launcher} says this is rank {started.rank} of {started.world_size}, but "
            f"RANK is {rank} and WORLD_SIZE {size}; unset these two"
        )


def first_host(nodes: str) -> str:
    """The first of Slurm's list of nodes: `gpu[003-005,7],login` -> `gpu003`."""
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", nodes).split(",")[0]


def _set_ranks(*values: int | str) -> None:
    _before.update((name, os.environ.get(name)) for name in RANK_VARIABLES)
    os.environ.update(zip(RANK_VARIABLES, map(str, values), strict=True))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def joined(device: str = "auto", timeout_minutes: float = 30.0) -> Iterator[torch.device]:
    """Run a block as a rank of the process group; gives this rank's device. See `initialize`.

    Of several ranks one that fails leaves, whatever the others do, with the exit code of
    `report_error`; what several of them have to say is said by one. NCCL's communicators are
    destroyed by all ranks together: one that has failed alone would wait there for the others, who
    wait for it in a collective. So it ends its process at once.
    """
    try:
        chosen = initialize(device, timeout_minutes)
        with naming_lost_ranks():
            yield chosen
    except (Exception, KeyboardInterrupt) as error:
        if not dist.is_initialized() or world_size() == 1:
            raise
        code = report_error(error, say=_says(error))
        if dist.get_backend() == "nccl":
            os._exit(code)
        raise SystemExit(code) from error
    finally:
        shutdown()


def _says(error: BaseException) -> bool:
    """Whether this rank is the first that fails of what this error says."""
    assert _store is not None
    mine = str(rank())
    try:
        first = _store.compare_set(f"said: {error!r}", "", mine) == mine.encode()
        _store.set(f"failed: {mine}", "")
        if rank() == 0:  # the store may live in its process: others that fail too need it
            end, others = time.monotonic() + 2, range(1, world_size())
            while time.monotonic() < end and not all(
                _store.check([f"failed: {r}"]) for r in others
            ):
                time.sleep(0.05)
    except RuntimeError:  # the store is gone
        return True
    return first


def shutdown() -> None:
    """Leave the process group, and take back what was written into the environment."""
    global _roll_call
    if dist.is_initialized():
        dist.destroy_process_group()
        _roll_call = None
    for name, value in _before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    _before.clear()


def rank() -> int:
    return dist.get_rank()


def world_size() -> int:
    return dist.get_world_size()


def barrier() -> None:
    dist.barrier()


def all_reduce_mean(tensors: Sequence[Tensor], bucket_bytes: int = BUCKET_BYTES) -> None:
    """Average tensors of one dtype over all ranks in place, in flat buckets."""
    # Dividing first keeps sums of many ranks within the range of bf16 and fp16 gradients.
    _all_reduce_in_place(tensors, bucket_bytes, divisor=world_size())


def all_reduce_fragments(tensors: Sequence[Tensor], bucket_bytes: int = BUCKET_BYTES) -> None:
    """Put tensors together of which each element is set on one rank and 0 on the others."""
    _all_reduce_in_place(tensors, bucket_bytes, divisor=1)


def _all_reduce_in_place(tensors: Sequence[Tensor], bucket_bytes: int, divisor: int) -> None:
    if world_size() == 1:
        return
    for bucket in buckets(tensors, bucket_bytes):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        flat.div_(divisor)
        dist.all_reduce(flat)
        for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))


def buckets(tensors: Iterable[Tensor], bucket_bytes: int = BUCKET_BYTES) -> Iterable[list[Tensor]]:
    """Tensors in their order, in lists of at least so many bytes but for the last."""
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


@contextlib.contextmanager
def sole_use(folder: Path) -> Iterator[None]:
    """Hold a folder for these ranks together; see `files.sole_use`."""
    problem = ""
    with contextlib.ExitStack() as held:
        if rank() == 0:
            try:
                held.enter_context(files.sole_use(folder))
            except (InputError, OSError) as error:
                problem = str(error)
        if problem := broadcast_text(problem):
            raise InputError(problem)
        yield


def gather_rows(rows: Tensor) -> list[Tensor] | None:
    """Every rank's 1-D tensor, in rank order, on rank 0; None elsewhere. Lengths may differ."""
    mine = torch.zeros(world_size(), dtype=torch.int64, device=rows.device)
    mine[rank()] = len(rows)
    counts = all_reduce_sum(mine).tolist()
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


def text_of_long_work(work: Callable[[], str]) -> str:
    """Rank 0's text from `work` on every rank, which wait beyond any collective_timeout."""
    group = dist.new_group(backend="gloo", timeout=timedelta(days=30))
    box = [work() if rank() == 0 else ""]
    dist.broadcast_object_list(box, src=0, group=group)
    dist.destroy_process_group(group)
    return box[0]
