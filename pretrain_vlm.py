"""Pretrain a vision-language model with Decomposed Attention: one stage per call.

    torchrun --nproc-per-node 2 pretrain_vlm.py --config model.yaml --config stage1.yaml

`--section.field value` overrides any setting, `--dry-run` prints the plan of the run. It also runs
under srun, mpirun and as one process. docs/ explains the settings; `--help` lists them.
"""

import os
import sys

from megatron_dattn.runtime.signals import SignalWatcher

SIGNALS = SignalWatcher()
if __name__ == "__main__":
    SIGNALS.__enter__()  # noted from here on: imports take seconds
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # why, say the scripts in examples

from megatron_dattn.config.cli import CommandLine, parse_command_line  # noqa: E402
from megatron_dattn.config.pretrain import PretrainConfig  # noqa: E402
from megatron_dattn.errors import EXIT_USER_ERROR, UserError  # noqa: E402
from megatron_dattn.runtime.error_report import refuse, report_error  # noqa: E402
from megatron_dattn.runtime.launcher import Launch, read_launch  # noqa: E402
from megatron_dattn.runtime.log import (  # noqa: E402
    give_up_unwritable_output,
    setup_logging,
    silence_import_warnings,
)
from megatron_dattn.runtime.signals import EXIT_INTERRUPTED  # noqa: E402
from megatron_dattn.runtime.tool import run_tool  # noqa: E402


def main(argv: list[str]) -> int:
    """Run the command line; the exit code says how it ended (see training/exit_reason.py)."""
    launch = Launch()  # where its variables make no sense, every process is the first that says so
    try:
        launch = read_launch()
        setup_logging(launch.rank)
        command = parse_command_line(argv)
    except UserError as error:
        return refuse(launch, error)
    # Imported late: help and mistakes in the command line need neither torch nor megatron-core.
    silence_import_warnings()
    if command.dry_run is None:
        return pretrain(command.config, launch)
    return run_tool(lambda: plan(command, launch))


def pretrain(config: PretrainConfig, launch: Launch) -> int:
    """Train one stage to its end, or until it has to stop."""
    from megatron_dattn.training.pretrain import run_to_its_end

    with SIGNALS.interruptible():
        ending = run_to_its_end(config, launch, SIGNALS)
    if ending.exit_code:
        return report_error(launch, ending.detail, ending.exit_code, shared=ending.is_shared)
    return 0


def plan(command: CommandLine, launch: Launch) -> int:
    """Print what the run would be, and what would end its start; nothing is started."""
    from megatron_dattn.training.dry_run import print_plan

    try:
        print_plan(command.config, command.dry_run or "here", command.dry_run_rank)
    except UserError as error:
        return report_error(launch, str(error), EXIT_USER_ERROR)
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    SIGNALS.ignore_requests()
    give_up_unwritable_output()
    if code == EXIT_INTERRUPTED:
        os._exit(code)  # at once: not waiting for what the loader's processes were about to say
    sys.exit(code)
