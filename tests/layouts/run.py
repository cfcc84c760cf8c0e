"""Compare training under parallel layouts with one process: loss, every gradient, weights.

    python -m tests.layouts.run --write                   all of it, into the page's tables
    python -m tests.layouts.run                           all layouts, models and stages
    python -m tests.layouts.run --resharding              checkpoints under other layouts
    python -m tests.layouts.run cp2 cp4 --write           these layouts, into their lines
    python -m tests.layouts.run cp2 cp4 --resharding      checkpoints from and to these
    python -m tests.layouts.run tp2+sp --attention dattn --family gemma2 --stage 1

Starts the ranks itself, one to four on this machine, over gloo. A tiny model trains a few steps in
float64 by the product's own step; the largest relative differences are printed. Ends with 1 if one
is too large.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from megatron_dattn.runtime.tool import ToolParser, run_tool


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    options = _parser().parse_args(arguments)
    return run_tool(lambda: _compare(options))


def _compare(options: argparse.Namespace) -> int:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # ranks of one machine, over gloo, in float64
    # Imported late: --help should not wait for torch.
    from megatron_dattn.runtime.cpu import enable_cpu_runtime

    enable_cpu_runtime()
    from tests.layouts.cells import Cell, matrix
    from tests.layouts.compare import Deviation, compare
    from tests.layouts.resharding import MOVES, TOLERANCE, Move, reshard
    from tests.layouts.table import write

    found: dict[Cell, Deviation] = {}
    moves: dict[Move, float] = {}
    if not options.resharding:
        chosen = options.attention, options.family, options.stage
        found = compare(matrix(options.layouts or None, *chosen), _say)
    for cell, deviation in found.items():
        print(
            f"{'ok    ' if deviation.is_small else 'WRONG '} {cell!s:<44} loss {deviation.loss:.1e}"
            f"  gradients {deviation.gradients:.1e}  weights {deviation.weights:.1e}  "
            f"({deviation.worst})"
        )
    if options.resharding or (options.write and not options.layouts):
        named = options.layouts
        of_these = [m for m in MOVES if not named or {m.source, m.target} & {*named}]
        _say(f"{len(of_these)} checkpoints under other layouts")
        moves = reshard(of_these)
    for move, loss in moves.items():
        word = "ok    " if loss <= TOLERANCE else "WRONG "
        print(f"{word} {move.source} -> {move.target}{' (new stage)' * move.new_stage}: {loss:.1e}")
    if options.write:
        write(found, moves)
    are_small = [deviation.is_small for deviation in found.values()]
    return 0 if all([*are_small, *(loss <= TOLERANCE for loss in moves.values())]) else 1


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = ToolParser(__doc__)
    parser.add_argument("layouts", nargs="*", metavar="LAYOUT", help="such as tp2xpp2+sp")
    parser.add_argument("--attention", nargs="+", default=("dattn", "s_attn"), metavar="PRESET")
    parser.add_argument("--family", nargs="+", default=("mistral", "gemma2"))
    parser.add_argument(
        "--stage",
        nargs="+",
        type=int,
        choices=(1, 2, 3),
        help="1 trains the adapter, 3 everything; by default those that a layout is listed for",
    )
    parser.add_argument(
        "--resharding", action="store_true", help="of these layouts, checkpoints under others alone"
    )
    parser.add_argument(
        "--write", action="store_true", help="what was compared, into docs/parallelism.md"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
