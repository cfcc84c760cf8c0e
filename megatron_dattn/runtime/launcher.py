"""Who started this process, and its place among the others: read once from the environment.

torchrun (and whoever sets the same variables), `srun` and `mpirun` each tell a process its number
in variables of their own. A launcher that is overlooked does not fail: every process takes itself
for a whole run, trains alone, and all of them write into the same folder. So what the environment
says must add up, or the run does not start.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_dattn.errors import ConfigError

# Rank, world size, rank on the host, processes on the host. Hydra is the launcher of MPICH and of
# Intel MPI; it shares PMI_RANK with srun, which does not set the third.
_MPI_VARIABLES = {
    "Open MPI's mpirun": tuple(
        f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    ),
    "MVAPICH's mpirun": tuple(
        f"MV2_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    ),
    "mpiexec": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}
_DEFAULT_PORT = 29500
# Below the range from which systems hand out ports of their own.
_FIRST_PORT, _NUM_PORTS = 20000, 12000
_REMEDY = "start it with torchrun or srun (examples/slurm/README.md)"


@dataclass(frozen=True)
class Launch:
    """This process's place in the run."""

    launcher: str = "no launcher"
    """Who started it, in words."""
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Number of this process among those of its host."""
    address: str | None = None
    """Host on which all ranks meet; None where nobody has named one."""
    port: int | None = None
    leaves_last: bool = False
    """Whether this process's torchrun holds the store over which the nodes' torchruns end."""
    doubt: str | None = None
    """Why this process, which nobody has numbered, may be one of several all the same."""

    def require_no_doubt(self) -> None:
        """Refuse to train alone where that can hardly be meant.

        Raises:
            ConfigError: there is a doubt.
        """
        if self.doubt is not None:
            raise ConfigError(self.doubt)

    @property
    def belongs_to_parent(self) -> bool:
        """True if the process that started this one is a launcher, with which it is to end.

        A lone task of srun or mpirun may have been started by hand in an interactive step; who sets
        the variables of an unknown launcher may be a shell that goes away.
        """
        if self.launcher in ("no launcher", "a launcher"):
            return False
        return self.launcher == "torchrun" or self.world_size > 1

    def meeting_point(self) -> tuple[str, int]:
        """Host and port on which the ranks of a run of several meet.

        Raises:
            ConfigError: one of them is not known.
        """
        for name, value in (("MASTER_ADDR", self.address), ("MASTER_PORT", self.port)):
            if value is None:
                raise ConfigError(
                    f"{self.launcher} started rank {self.rank} of {self.world_size}, but {name} is "
                    "not set: set it to the host, or a free port there, of rank 0 for all ranks, "
                    f"or {_REMEDY}"
                )
        assert self.address is not None
        assert self.port is not None
        return self.address, self.port


def read_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Read what the launcher's variables say; a run of one process where there are none.

    torchrun's come first: it may itself have been started by srun or mpirun.

    Raises:
        ConfigError: the variables contradict each other, or some are missing.
    """
    if "RANK" in environment:
        return _by_rank(environment)
    for launcher, names in _MPI_VARIABLES.items():
        if names[0] in environment and names[2] in environment:
            return _by_mpi(launcher, names, environment)
    if "SLURM_PROCID" in environment:
        return _by_slurm(environment)
    for name in ("PMIX_RANK", "PMI_RANK"):
        if name in environment and environment.get("PMI_SIZE") != "1":
            raise ConfigError(
                f"{name} is {environment[name]}: a launcher that is not known here started this "
                f"process as one of several; {_REMEDY}"
            )
    return Launch(doubt=_doubt_of_world_size(environment, 1))


def _by_rank(environment: Mapping[str, str]) -> Launch:
    """From the variables of torchrun, which other launchers set as well."""
    launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in environment else "a launcher"
    if "WORLD_SIZE" not in environment:
        raise ConfigError(
            f"RANK is {environment['RANK']}, but WORLD_SIZE is not set: unset RANK for a run of "
            f"one process, or {_REMEDY}"
        )
    world_size = _number(environment, "WORLD_SIZE", at_least=1)
    if world_size > 1 and "LOCAL_RANK" not in environment:
        raise ConfigError(
            f"RANK is {environment['RANK']} of {world_size}, but LOCAL_RANK is not set: set it to "
            f"the number of the process on its host, counted from 0, or {_REMEDY}"
        )
    return Launch(
        launcher,
        _rank(environment, "RANK", world_size),
        world_size,
        _number(environment, "LOCAL_RANK", default=0),
        environment.get("MASTER_ADDR") or None,
        _port(environment, None),
        leaves_last=launcher == "torchrun"
        and environment.get("GROUP_RANK") == "0"
        and environment.get("GROUP_WORLD_SIZE", "1") != "1",
    )


def _by_mpi(launcher: str, names: tuple[str, ...], environment: Mapping[str, str]) -> Launch:
    rank, size, local_rank, local_size = names
    world_size = _number(environment, size, at_least=1)
    here = _number(environment, local_size, default=world_size)
    return Launch(
        launcher,
        _rank(environment, rank, world_size),
        world_size,
        _number(environment, local_rank),
        environment.get("MASTER_ADDR") or ("127.0.0.1" if here == world_size else None),
        _port(environment, _DEFAULT_PORT),
        doubt=_doubt_of_world_size(environment, world_size),
    )


def _by_slurm(environment: Mapping[str, str]) -> Launch:
    """From the variables of a Slurm task.

    A batch script, and an interactive step, see the tasks of the whole job in SLURM_NTASKS without
    being one of them: SLURM_STEP_NUM_TASKS, which srun alone sets, is what counts.
    """
    rank = _number(environment, "SLURM_PROCID")
    in_step = "SLURM_STEP_NUM_TASKS" in environment or "SLURM_STEP_ID" in environment
    tasks = _number(environment, "SLURM_NTASKS", default=1)
    if rank == 0 and not in_step:
        doubt = _doubt_of_world_size(environment, 1)
        if tasks > 1:
            doubt = (
                f"Slurm has reserved {tasks} tasks (SLURM_NTASKS) for this job, but this process "
                "was not started by srun and would train alone: start it with srun or torchrun "
                "(examples/slurm/README.md), or unset SLURM_NTASKS if one process is meant"
            )
        return Launch(doubt=doubt)
    world_size = _number(environment, "SLURM_STEP_NUM_TASKS", default=tasks)
    if world_size == 1:
        return Launch("srun", doubt=_doubt_of_world_size(environment, 1))
    if environment.get("WORLD_SIZE", str(world_size)) != str(world_size):
        raise ConfigError(
            f"WORLD_SIZE is {environment['WORLD_SIZE']}, but srun started {world_size} tasks; "
            "unset it"
        )
    return Launch(
        "srun",
        _rank(environment, "SLURM_PROCID", world_size),
        world_size,
        _number(environment, "SLURM_LOCALID"),
        environment.get("MASTER_ADDR") or _first_host(environment),
        _port(environment, _slurm_port(environment)),
    )


def _doubt_of_world_size(environment: Mapping[str, str], world_size: int) -> str | None:
    """WORLD_SIZE of an earlier command, or of a launcher that forgot the rest."""
    given = environment.get("WORLD_SIZE", "")
    if given in ("", str(world_size)):
        return None
    return (
        f"WORLD_SIZE is {given}, but RANK is not set: unset WORLD_SIZE for a run of one process, "
        f"or {_REMEDY}"
    )


def _first_host(environment: Mapping[str, str]) -> str | None:
    """The first of a compact list of hosts: `gpu[07-09,12],login` begins with gpu07."""
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"):
        if hosts := environment.get(name):
            first = re.match(r"(?:\[[^\]]*\]|[^,\[])+", hosts)
            return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0]) if first else None
    return None


def _slurm_port(environment: Mapping[str, str]) -> int:
    """Follows from the job and the step, so that two of them on a host do not collide."""
    job = _number(environment, "SLURM_JOB_ID", default=0)
    return _FIRST_PORT + (job + _number(environment, "SLURM_STEP_ID", default=0)) % _NUM_PORTS


def _port(environment: Mapping[str, str], default: int | None) -> int | None:
    if not environment.get("MASTER_PORT"):
        return default
    port = _number(environment, "MASTER_PORT")
    if port > 65535:
        raise ConfigError(f"MASTER_PORT is {port}; ports end at 65535")
    return port


def _rank(environment: Mapping[str, str], name: str, world_size: int) -> int:
    rank = _number(environment, name)
    if rank >= world_size:
        raise ConfigError(
            f"{name} is {rank}, but the world has {world_size} ranks, counted from 0; {_REMEDY}"
        )
    return rank


def _number(
    environment: Mapping[str, str], name: str, *, at_least: int = 0, default: int | None = None
) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None or not re.fullmatch(r"[0-9]{1,10}", text) or int(text) < at_least:
        what = "not set" if text is None else f"{text[:40]!r}, not a number from {at_least} on"
        raise ConfigError(f"environment variable {name} is {what}; {_REMEDY}")
    return int(text)
