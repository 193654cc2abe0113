"""What a launcher has left in the environment: which rank this is, and where GPUs should be.

deepspeed and torchrun set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; what srun and
mpirun set is translated into these, where the last two may be given. Without any, the run has one
rank.
"""

import os
import re
import socket
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dreamprm_dist.errors import InputError

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
HIDING = ("", "-1", "NoDevFiles")  # values of CUDA_VISIBLE_DEVICES that say: no GPU, on purpose

_before: dict[str, str | None] = {}  # what the environment had where we have set a variable


def adopt_environment() -> None:
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


def restore_environment() -> None:
    """Take back what `adopt_environment` wrote."""
    for name, value in _before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    _before.clear()


class View(NamedTuple):
    """What a rank sees.

    Attributes:
        host: name of its machine.
        local_rank: its number there.
        gpus: UUIDs of the GPUs that it sees, in their order.
    """

    host: str
    local_rank: int
    gpus: list[str]


def own_gpus(views: Sequence[View]) -> list[int]:
    """Each rank's GPU, by its place among those that the rank sees; no two ranks share one.

    They choose in turn: the one of the local rank or, where a rank sees fewer or that one is taken,
    the next free one. So a rank that was given a GPU for itself alone has that.

    Args:
        views: what each rank sees.

    Raises:
        InputError: a rank sees no GPU, or none that is free.
    """
    places: list[int] = []
    owners: dict[str, int] = {}
    for rank, (host, local_rank, gpus) in enumerate(views):
        free = [g for g in gpus[local_rank:] + gpus if g not in owners]
        if not free:
            if not gpus:
                raise InputError(
                    f"rank {rank} finds no GPU on {host}; see that nvidia-smi lists one and torch "
                    "is built with CUDA, or use --device cpu"
                )
            users = ", ".join(str(r) for r in sorted(owners[g] for g in gpus))
            raise InputError(
                f"rank {rank} has no GPU: the {len(gpus)} that it sees on {host} belong to rank "
                f"{users}; start at most one rank for each GPU, or use --device cpu"
            )
        owners[free[0]] = rank
        places.append(gpus.index(free[0]))
    return places


def missing_gpus(env: Mapping[str, str], has_nvidia_smi: bool, cuda: str | None) -> str | None:
    """A sentence where GPUs should be found and are not; None where nothing speaks of any.

    Args:
        env: the environment of a rank that has found none.
        has_nvidia_smi: whether the driver's command is installed.
        cuda: the version that torch is built with, if any.
    """
    if env.get("CUDA_VISIBLE_DEVICES") in HIDING:
        return None
    places = ("CUDA_VISIBLE_DEVICES", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS")
    signs = [f"{name} is {env[name]}" for name in places if env.get(name)]
    if (count := env.get("SLURM_GPUS_ON_NODE", "0")) != "0":
        signs.append(f"SLURM_GPUS_ON_NODE is {count}")
    if has_nvidia_smi:
        signs.append("nvidia-smi is installed")
    if not signs:
        return None
    reason, remedy = "it is built for CPUs only", "install a torch that is built with CUDA"
    if cuda:
        reason = f"it is built with CUDA {cuda}"
        remedy = "see whether nvidia-smi lists GPUs and a driver for that CUDA"
    return (
        f"torch finds no GPU ({reason}), though {signs[0]}: this goes on on the CPU; {remedy}, or "
        "say --device cpu"
    )
