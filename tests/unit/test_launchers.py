"""The ranks that each launcher's environment stands for, and the GPU that each of them has."""

import re

import pytest

from dreamprm_dist import launchers
from dreamprm_dist.errors import InputError
from dreamprm_dist.launchers import View, missing_gpus, own_gpus

SRUN = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "15007"}
STEP = SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "gpu[03-04]"}
MPIRUN = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}


@pytest.fixture
def ranks_in(monkeypatch):
    """Rank, world size, local rank, master address and port in an environment."""

    def find(env: dict[str, str]) -> tuple[str, ...]:
        monkeypatch.setattr(launchers.os, "environ", env := dict(env))
        launchers.adopt_environment()
        found = tuple(env.get(name) for name in launchers.RANK_VARIABLES)
        launchers.restore_environment()
        return found

    return find


def test_a_step_of_slurm(ranks_in):
    assert ranks_in(STEP) == ("1", "2", "0", "gpu03", "15007")
    assert ranks_in(STEP | {"MASTER_ADDR": "here", "MASTER_PORT": "9"})[3:] == ("here", "9")


@pytest.mark.parametrize(
    "env", [{}, SRUN, {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}]
)
def test_a_script_alone_is_one_rank(ranks_in, env):
    """Slurm's batch script, too: it is no step."""
    assert ranks_in(env)[:4] == ("0", "1", "0", "127.0.0.1")


def test_torchrun_once_a_node_counts_anew(ranks_in):
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "x"}
    assert ranks_in(STEP | torchrun)[:3] == ("5", "8", "1")


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "1"}, "RANK is set, but WORLD_SIZE is not"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set, but RANK is not"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "ranks count from 0 to 1"),
        (
            STEP | {"RANK": "0", "WORLD_SIZE": "1"},
            "srun says this is rank 1 of 2, but RANK is 0 and",
        ),
        (
            MPIRUN | {"RANK": "0", "WORLD_SIZE": "4"},
            "mpirun says this is rank 1 of 4, but RANK is 0",
        ),
    ],
)
def test_launchers_that_disagree(ranks_in, env, message):
    with pytest.raises(ValueError, match=message):
        ranks_in(env)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[003-005,7],login", "gpu003"),
        ("login,gpu[1-2]", "login"),
        ("r[1-2]n[3-4]", "r1n3"),
        ("node-1", "node-1"),
    ],
)
def test_the_first_host(nodes, first):
    assert launchers.first_host(nodes) == first


def views(*gpus: str, hosts: str = "", local_ranks: str = "") -> list[View]:
    """What ranks see: each a letter for each GPU, on host "a" and by their number unless given."""
    seen = enumerate(zip(gpus, hosts or "a" * len(gpus), strict=True))
    return [View(host, int(local_ranks[r]) if local_ranks else r, list(g)) for r, (g, host) in seen]


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        (views("A"), [0]),
        (views("ABCD", "ABCD"), [0, 1]),  # as many of all as there are ranks
        (views("ABCD", "ABCD", "ABCD", "ABCD"), [0, 1, 2, 3]),
        # Each its own, alone or with others: one task per GPU.
        (views("A", "B", "C", "D"), [0, 0, 0, 0]),
        (views("AB", "CD"), [0, 1]),
        (views("AB", "CD", "EF"), [0, 1, 0]),
        # The launcher says which, and in another order than ranks have.
        (views("ABCD", local_ranks="2"), [2]),
        (views("AB", "AB", local_ranks="10"), [1, 0]),
        # Several launchers on one machine, each counting from 0.
        (views("AB", "AB", local_ranks="00"), [0, 1]),
        (views("ABCD", "ABCD", "ABCD", "ABCD", local_ranks="0101"), [0, 1, 2, 3]),
        (views("AB", "AB", "CD", "CD", local_ranks="0101"), [0, 1, 0, 1]),
        # Two machines.
        (views("AB", "AB", "CD", "CD", hosts="aabb", local_ranks="0101"), [0, 1, 0, 1]),
        (views("A", "B", "C", "D", hosts="aabb", local_ranks="0101"), [0, 0, 0, 0]),
    ],
)
def test_each_rank_has_a_gpu_of_its_own(ranks, expected):
    places = own_gpus(ranks)
    assert places == expected
    taken = [view.gpus[place] for view, place in zip(ranks, places, strict=True)]
    assert len(set(taken)) == len(ranks)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        # Two containers with names of their own on one machine.
        (
            views("A", "A", hosts="ab"),
            "rank 1 has no GPU: the 1 that it sees on b belong to rank 0;",
        ),
        (views("A", "A", "A", "A"), "rank 1 has no GPU: the 1 that it sees on a belong to rank 0;"),
        (
            views("AB", "AB", "AB"),
            "rank 2 has no GPU: the 2 that it sees on a belong to rank 0, 1;",
        ),
        (views("A", "B", "B"), "rank 2 has no GPU: the 1 that it sees on a belong to rank 1;"),
        (views("A", "A", hosts="bb", local_ranks="00"), "rank 1 has no GPU: .* on b belong"),
        (views(""), "rank 0 finds no GPU on a; .* or use --device cpu"),
        # A machine without GPUs among others.
        (views("A", "", hosts="ab", local_ranks="00"), "rank 1 finds no GPU on b;"),
    ],
)
def test_two_ranks_on_one_gpu_are_refused_by_their_numbers(ranks, message):
    with pytest.raises(InputError, match=message):
        own_gpus(ranks)


@pytest.mark.parametrize(
    ("env", "nvidia_smi", "sign"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, False, "CUDA_VISIBLE_DEVICES is 0,1"),
        ({"SLURM_STEP_GPUS": "0"}, False, "SLURM_STEP_GPUS is 0"),
        ({"SLURM_JOB_GPUS": "0"}, False, "SLURM_JOB_GPUS is 0"),
        ({"SLURM_GPUS_ON_NODE": "8"}, False, "SLURM_GPUS_ON_NODE is 8"),
        ({}, True, "nvidia-smi is installed"),
        ({"SLURM_GPUS_ON_NODE": "0"}, True, "nvidia-smi is installed"),
    ],
)
@pytest.mark.parametrize(
    ("cuda", "remedy"),
    [
        (None, r"\(it is built for CPUs only\).* install a torch that is built with CUDA"),
        ("13.0", r"\(it is built with CUDA 13.0\).* whether nvidia-smi lists GPUs"),
    ],
)
def test_gpus_that_torch_does_not_find_are_spoken_of(env, nvidia_smi, sign, cuda, remedy):
    said = missing_gpus(env, nvidia_smi, cuda)
    assert f"though {sign}: this goes on on the CPU;" in said
    assert re.search(remedy, said) and said.endswith("or say --device cpu")


@pytest.mark.parametrize(
    ("env", "nvidia_smi"),
    [
        ({}, False),
        ({"SLURM_GPUS_ON_NODE": "0", "SLURM_JOB_ID": "7"}, False),
        ({"CUDA_VISIBLE_DEVICES": ""}, True),
        ({"CUDA_VISIBLE_DEVICES": "-1", "SLURM_JOB_GPUS": "0"}, True),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles", "SLURM_GPUS_ON_NODE": "0"}, True),
    ],
)
def test_a_machine_without_gpus_or_whose_user_hides_them_is_not_warned(env, nvidia_smi):
    assert missing_gpus(env, nvidia_smi, None) is None
