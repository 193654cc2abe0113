"""Start-up of the ranks, and their collectives by name: the only user of torch.distributed."""

import contextlib
import itertools
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from dreamprm_dist import files, launchers
from dreamprm_dist.errors import InputError, report_error, start_logging

logger = logging.getLogger(__name__)

JOIN_TIMEOUT = timedelta(minutes=10)
BUCKET_BYTES = 256 * 2**20
ROWS_AT_ONCE = 2**20  # that travel to rank 0, and that every rank has room for meanwhile

_roll_call: dist.ProcessGroup | None = None  # nothing else uses it, so nothing has failed on it
_store: dist.Store | None = None  # where the ranks have met
_device: torch.device | None = None  # of this rank, as long as it is in the process group
_long_works = itertools.count()  # every rank counts the same


class RankLostError(ConnectionError):
    """A rank hangs or has ended while others wait for it."""


def initialize(device: str = "auto", timeout_minutes: float = 30.0) -> torch.device:
    """Join the process group, once, and choose this rank's device.

    Args:
        device: auto | cuda | cpu.
        timeout_minutes: how long a collective waits for a rank.

    Raises:
        InputError: a rank has no GPU of its own, where cuda is asked for or others have one; or the
            environment contradicts itself about the ranks.
    """
    global _device, _roll_call, _store
    if _device is not None:  # the benchmarks make several runs
        return _device
    launchers.adopt_environment()
    gpus = [] if device == "cpu" else _visible_gpus()
    timeout = timedelta(minutes=timeout_minutes)
    _store, rank, views = _meet(max(timeout, JOIN_TIMEOUT), gpus)
    use_cuda = device == "cuda" or any(view.gpus for view in views)
    chosen = torch.device("cpu")
    if use_cuda:
        chosen = torch.device("cuda", launchers.own_gpus(views)[rank])
        torch.cuda.set_device(chosen)
        # float32 is meant: torch has TF32 on for convolutions, and the PRM's patches are one.
        torch.backends.cudnn.allow_tf32 = False
    # DeepSpeed makes groups of its own, with torch's default.
    dist.distributed_c10d.default_pg_timeout = timeout
    dist.distributed_c10d.default_pg_nccl_timeout = timeout
    dist.init_process_group(
        "nccl" if use_cuda else "gloo",
        timeout=timeout,
        store=_store,
        rank=rank,
        world_size=len(views),
        # NCCL then connects all ranks here, once for every collective, and says here what is wrong.
        # One rank has nobody to connect to.
        device_id=chosen if use_cuda and len(views) > 1 else None,
    )
    if not use_cuda:
        _roll_call = dist.new_group(backend="gloo", timeout=timeout)
    start_logging(rank)
    if device == "auto" and not use_cuda:
        nvidia_smi = shutil.which("nvidia-smi") is not None
        if warning := launchers.missing_gpus(os.environ, nvidia_smi, torch.version.cuda):
            logger.warning(warning)
    _device = chosen
    return chosen


def _visible_gpus() -> list[str]:
    # Without a driver for torch's CUDA there still is a count.
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [str(torch.cuda.get_device_properties(index).uuid) for index in range(count)]


def _meet(timeout: timedelta, gpus: list[str]) -> tuple[dist.Store, int, list[launchers.View]]:
    """Wait until all ranks are there: they do not start at once, and collectives wait for less.

    Args:
        gpus: those that this rank sees.

    Returns:
        The store, this rank, and what each of them sees.
    """
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    here, read = ([f"{key}/{r}" for r in range(world_size)] for key in ("here", "read"))
    view = launchers.View(socket.gethostname(), int(os.environ["LOCAL_RANK"]), gpus)
    store.set(here[rank], json.dumps(view))
    store.wait(here, timeout)
    views = [launchers.View(*json.loads(text)) for text in store.multi_get(here)]
    store.set(read[rank], "")
    if rank == 0:  # the store may live in its process, which may have nothing else to do but say so
        store.wait(read, timeout)
    return store, rank, views


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
    global _device, _roll_call
    if dist.is_initialized():
        dist.destroy_process_group()
        _device = _roll_call = None
    launchers.restore_environment()


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
    """Every rank's 1-D tensor, in rank order, on rank 0's CPU; None elsewhere. Lengths may differ.

    Each rank broadcasts its rows in pieces: that needs no connections but those of training, and
    of a full GPU no more than a piece.
    """
    lengths = torch.zeros(world_size(), dtype=torch.int64, device=rows.device)
    lengths[rank()] = len(rows)
    counts = all_reduce_sum(lengths).tolist()
    parts = [rows.cpu()]
    for source in range(1, world_size()):
        part = torch.empty(0 if rank() else counts[source], dtype=rows.dtype)
        for start in range(0, counts[source], ROWS_AT_ONCE):
            place = slice(start, min(start + ROWS_AT_ONCE, counts[source]))
            if rank() == source:
                piece = rows[place].contiguous()
            else:
                piece = rows.new_empty(place.stop - start)
            dist.broadcast(piece, src=source)
            if rank() == 0:
                part[place] = piece
        parts.append(part)
    return None if rank() else parts


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
    """Rank 0's text from `work` on every rank, which wait beyond any collective_timeout.

    Raises:
        RankLostError: rank 0 has ended meanwhile.
    """
    assert _store is not None
    key = f"long work/{next(_long_works)}"
    if rank() == 0:
        _store.set(key, text := work())
        return text
    try:
        while not _store.check([key]):
            if _store.check(["failed: 0"]):  # the store may outlive it
                raise RuntimeError
            time.sleep(0.2)
        return _store.get(key).decode()
    except RuntimeError as error:  # or the store is gone
        raise RankLostError(
            f"rank {rank()} waited for rank 0 in vain: it has ended; look at its log"
        ) from error
