"""Every launcher's variables, as it sets them, and those that do not add up."""

import pytest

from megatron_dattn.errors import ConfigError
from megatron_dattn.runtime.launcher import Launch, read_launch

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "node-0",
    "MASTER_PORT": "29501",
    "TORCHELASTIC_RUN_ID": "7",
}
# What a batch script finds, and what srun adds for a task.
BATCH = {
    "SLURM_JOB_ID": "12345",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
SRUN = BATCH | {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_RANK": "1",
}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"}


@pytest.mark.parametrize(
    ("environment", "launch"),
    [
        ({}, Launch()),
        ({"WORLD_SIZE": "1"}, Launch()),
        (TORCHRUN, Launch("torchrun", 3, 8, 1, "node-0", 29501)),
        (SRUN | TORCHRUN, Launch("torchrun", 3, 8, 1, "node-0", 29501)),
        (SRUN, Launch("srun", 5, 8, 1, "gpu07", 20000 + 345)),
        (
            SRUN | {"WORLD_SIZE": "8", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"},
            Launch("srun", 5, 8, 1, "10.0.0.1", 1234),
        ),
        (SRUN | {"PMI_RANK": "5", "PMI_SIZE": "8"}, Launch("srun", 5, 8, 1, "gpu07", 20345)),
        (OPEN_MPI, Launch("Open MPI's mpirun", 1, 2, 1, "127.0.0.1", 29500)),
        (BATCH | OPEN_MPI, Launch("Open MPI's mpirun", 1, 2, 1, "127.0.0.1", 29500)),
        (HYDRA | {"MASTER_ADDR": "a"}, Launch("mpiexec", 1, 2, 0, "a", 29500)),
    ],
)
def test_each_launcher_is_understood(environment: dict[str, str], launch: Launch) -> None:
    assert read_launch(environment) == launch


@pytest.mark.parametrize(
    "environment",
    [
        {name: value for name, value in BATCH.items() if name != "SLURM_PROCID"},
        BATCH | {"SLURM_NTASKS": "1"},
        # An interactive step keeps the job's SLURM_NTASKS.
        BATCH | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"},
        BATCH | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"},
    ],
    ids=["salloc", "sbatch of one task", "interactive step", "srun of one task"],
)
def test_one_process_inside_a_job_is_one_process(environment: dict[str, str]) -> None:
    launch = read_launch(environment)
    launch.require_no_doubt()
    assert (launch.rank, launch.world_size, launch.local_rank) == (0, 1, 0)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE is 8, but RANK is not set: unset WORLD_SIZE"),
        (BATCH, "Slurm has reserved 8 tasks"),
        (BATCH | {"SLURM_NTASKS": "1", "WORLD_SIZE": "8"}, "WORLD_SIZE is 8"),
    ],
)
def test_a_process_that_may_not_be_alone_is_in_doubt(
    environment: dict[str, str], words: str
) -> None:
    """Harmless for a conversion, not for training."""
    launch = read_launch(environment)
    assert launch.world_size == 1
    with pytest.raises(ConfigError, match=words):
        launch.require_no_doubt()


def without(environment: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in names}


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (without(TORCHRUN, "WORLD_SIZE"), "RANK is 3, but WORLD_SIZE is not set"),
        (without(TORCHRUN, "LOCAL_RANK"), "LOCAL_RANK is not set"),
        (TORCHRUN | {"RANK": "8"}, "RANK is 8, but the world has 8 ranks"),
        (TORCHRUN | {"RANK": "1", "WORLD_SIZE": "1"}, "RANK is 1, but the world has 1 ranks"),
        (TORCHRUN | {"RANK": "-1"}, "RANK is '-1'"),
        (TORCHRUN | {"WORLD_SIZE": "many"}, "WORLD_SIZE is 'many'"),
        (TORCHRUN | {"WORLD_SIZE": "0"}, "WORLD_SIZE is '0', not a number from 1 on"),
        (TORCHRUN | {"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'"),
        (TORCHRUN | {"MASTER_PORT": "99999"}, "MASTER_PORT is 99999"),
        (TORCHRUN | {"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        (SRUN | {"WORLD_SIZE": "4"}, "WORLD_SIZE is 4, but srun started 8 tasks"),
        (SRUN | {"SLURM_PROCID": "9"}, "SLURM_PROCID is 9"),
        (without(SRUN, "SLURM_LOCALID"), "SLURM_LOCALID is not set"),
        (without(OPEN_MPI, "OMPI_COMM_WORLD_SIZE"), "OMPI_COMM_WORLD_SIZE is not set"),
        ({"PMIX_RANK": "1"}, "PMIX_RANK is 1"),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "PMI_RANK is 1"),
    ],
)
def test_what_does_not_add_up_is_refused(environment: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_launch(environment)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node-3", "node-3"),
        ("node-3,node-5", "node-3"),
        ("gpu[007-012,15],login1", "gpu007"),
        ("rack[1-2]n[05,07].cluster,other", "rack1n05.cluster"),
    ],
)
def test_ranks_meet_at_the_first_host_of_the_step(hosts: str, first: str) -> None:
    environment = SRUN | {"SLURM_STEP_NODELIST": hosts, "SLURM_JOB_NODELIST": "elsewhere"}
    assert read_launch(environment).meeting_point() == (first, 20345)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (without(TORCHRUN, "MASTER_ADDR"), "rank 3 of 8, but MASTER_ADDR is not set"),
        (without(TORCHRUN, "MASTER_PORT"), "rank 3 of 8, but MASTER_PORT is not set"),
        (without(SRUN, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"), "MASTER_ADDR is not set"),
        (HYDRA, "MASTER_ADDR is not set"),  # on two hosts
    ],
)
def test_a_meeting_point_must_be_known(environment: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_launch(environment).meeting_point()


@pytest.mark.parametrize(
    ("environment", "last"),
    [
        (TORCHRUN, False),
        (TORCHRUN | {"GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1"}, False),
        (TORCHRUN | {"GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2"}, False),
        (TORCHRUN | {"GROUP_RANK": "0", "GROUP_WORLD_SIZE": "2"}, True),
        (SRUN, False),
    ],
)
def test_who_leaves_last(environment: dict[str, str], last: bool) -> None:
    assert read_launch(environment).leaves_last == last


@pytest.mark.parametrize(
    ("launch", "belongs"),
    [
        (Launch(), False),
        (Launch("a launcher", 0, 2), False),
        (Launch("torchrun", 0, 1), True),
        (Launch("srun", 1, 2), True),
        (Launch("Open MPI's mpirun", 1, 2), True),
        (Launch("srun", 0, 1), False),
    ],
)
def test_who_ends_with_the_process_that_started_it(launch: Launch, belongs: bool) -> None:
    """What somebody has started by hand may outlive its shell."""
    assert launch.belongs_to_parent is belongs
