"""Pretrain a vision-language model with Decomposed Attention: one stage per call.

    torchrun --nproc-per-node 2 pretrain_vlm.py --config model.yaml --config stage1.yaml

`--section.field value` overrides any setting, `--dry-run` prints the plan of the run. Started
without torchrun it is a run of one process. docs/ explains the settings; `--help` lists them.
"""

import os
import sys

from megatron_dattn.errors import EXIT_USER_ERROR, UserError
from megatron_dattn.runtime.log import setup_logging, silence_import_warnings

silence_import_warnings()

from megatron_dattn.config.cli import parse_command_line  # noqa: E402
from megatron_dattn.config.pretrain import PretrainConfig  # noqa: E402


def main(argv: list[str]) -> int:
    """Run the command line; the exit code says how it ended (see training/exits.py)."""
    setup_logging(int(os.environ.get("RANK", "0")))
    try:
        command = parse_command_line(argv)
        if not command.dry_run:
            return pretrain(command.config)
        from megatron_dattn.training.dry_run import print_plan

        print_plan(command.config)
        return 0
    except UserError as error:
        return report_error(str(error), EXIT_USER_ERROR)


def pretrain(config: PretrainConfig) -> int:
    """Train one stage to its end, or until it has to stop."""
    # Imported late: mistakes in the command line need no megatron-core to be seen.
    from megatron_dattn.runtime.distributed import destroy_distributed
    from megatron_dattn.training.build import start
    from megatron_dattn.training.exits import ExitReason, NumericsError, record_exit
    from megatron_dattn.training.setup import open_run
    from megatron_dattn.training.trainer import train

    try:
        start(config)
        with open_run(config) as run:
            ending = train(run)
    except UserError as error:
        ending = ExitReason("user_error", detail=str(error))
    except NumericsError as error:
        ending = ExitReason("numerics", error.step, str(error))
    record_exit(config.checkpoint.save, ending)
    destroy_distributed()
    if ending.exit_code:
        return report_error(ending.detail, ending.exit_code)
    return 0


def report_error(message: str, exit_code: int) -> int:
    """Say it once: all ranks meet the same error."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"error: {message}", file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
