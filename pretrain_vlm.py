"""Pretrain a vision-language model with Decomposed Attention: one stage per call.

    torchrun --nproc-per-node 2 pretrain_vlm.py --config model.yaml --config stage1.yaml

`--section.field value` overrides any setting, `--dry-run` prints the plan of the run. It also runs
under srun and mpirun and, without a launcher, as one process. docs/ explains the settings; `--help`
lists them.
"""

import sys
from typing import Literal

from megatron_dattn.errors import EXIT_USER_ERROR, UserError
from megatron_dattn.runtime.launcher import Launch, read_launch
from megatron_dattn.runtime.log import setup_logging, silence_import_warnings

silence_import_warnings()

from megatron_dattn.config.cli import parse_command_line  # noqa: E402
from megatron_dattn.config.pretrain import PretrainConfig  # noqa: E402
from megatron_dattn.runtime.error_file import write_error_file  # noqa: E402


def main(argv: list[str]) -> int:
    """Run the command line; the exit code says how it ended (see training/exits.py)."""
    launch = Launch()  # where its variables make no sense, every process is the first that says so
    try:
        launch = read_launch()
        setup_logging(launch.rank)
        command = parse_command_line(argv)
    except UserError as error:
        return refuse(launch, error)
    if command.dry_run is None:
        return pretrain(command.config, launch)
    return plan(command.config, launch, command.dry_run)


def pretrain(config: PretrainConfig, launch: Launch) -> int:
    """Train one stage to its end, or until it has to stop."""
    # Imported late: mistakes in the command line need no megatron-core to be seen.
    from megatron_dattn.training.endings import run_to_its_end

    ending = run_to_its_end(config, launch)
    if ending.exit_code:
        shared = ending.reason != "rendezvous"  # who has not met the others has reasons of its own
        return report_error(launch, ending.detail, ending.exit_code, shared=shared)
    return 0


def plan(config: PretrainConfig, launch: Launch, place: Literal["here", "elsewhere"]) -> int:
    """Print what the run would be, and what would end its start; nothing is started."""
    from megatron_dattn.training.dry_run import print_plan

    try:
        print_plan(config, place)
    except UserError as error:
        return report_error(launch, str(error), EXIT_USER_ERROR)
    return 0


def refuse(launch: Launch, error: UserError) -> int:
    """End with a mistake that was met before the ranks have met."""
    if launch.world_size > 1:
        from megatron_dattn.runtime.distributed import share_refusal

        error = share_refusal(error)
    return report_error(launch, str(error), EXIT_USER_ERROR)


def report_error(launch: Launch, message: str, exit_code: int, *, shared: bool = True) -> int:
    """Say it once: all ranks meet the same error."""
    write_error_file(launch, f"error: {message}", exit_code, shared=shared)
    if launch.rank == 0:
        print(f"error: {message}", file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
