"""The ranks that each launcher's environment stands for, and environments that contradict them."""

import pytest

from dreamprm_dist import distributed

SRUN = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "15007"}
STEP = SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "gpu[03-04]"}
MPIRUN = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}


@pytest.fixture
def ranks_in(monkeypatch):
    """Rank, world size, local rank, master address and port in an environment."""

    def find(env: dict[str, str]) -> tuple[str, ...]:
        monkeypatch.setattr(distributed.os, "environ", env := dict(env))
        distributed._adopt_launcher_environment()
        found = tuple(env.get(name) for name in distributed.RANK_VARIABLES)
        distributed.shutdown()
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
    assert distributed.first_host(nodes) == first
