"""List the files of this project that a command runs through, in the order in which they are met.

    python tools/trace_code.py --within train_step pretrain_vlm.py --config a.yaml --train-iters 2
    python tools/trace_code.py tools/convert_checkpoint.py import --vision V --language L --output O

For whoever wants to read one way through the code, and to see how long it is. `--within` counts
only what runs inside calls of functions of that name, other threads left out. Importing a module
does not count; loader workers are processes of their own and are not seen.
"""

import argparse
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, FrameType

from megatron_dattn.runtime.tool import ToolParser, run_tool

ROOT = Path(__file__).resolve().parents[1]
_PACKAGE = str(ROOT / "megatron_dattn")


class Trace:
    """A profile function that notes the functions of the package while it is switched on."""

    def __init__(self, within: str | None) -> None:
        self.within = within
        self.functions: dict[CodeType, None] = {}
        self._depth = 0 if within else 1
        self._imports = 0

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(_PACKAGE):
            return
        if code.co_name == "<module>":
            self._imports += 1 if event == "call" else -1
        if code.co_name == self.within:
            self._depth += 1 if event == "call" else -1
        # Importing a module runs class bodies and decorators, which the profiler sees as calls.
        if event == "call" and self._depth and not self._imports:
            self.functions.setdefault(code)

    def report(self) -> str:
        """The files with their number of functions, then both numbers for all of them."""
        counts: dict[str, int] = {}
        for code in self.functions:
            name = str(Path(code.co_filename).relative_to(ROOT))
            counts[name] = counts.get(name, 0) + 1
        lines = [f"{count:4d}  {name}" for name, count in counts.items()]
        return "\n".join([*lines, f"{len(self.functions)} functions in {len(counts)} files"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code of the traced command."""
    parser = ToolParser(__doc__)
    parser.add_argument("--within", help="count inside calls of functions of this name alone")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="script and its arguments")
    options = parser.parse_args(arguments)
    if not options.command:
        parser.error("give a script, such as pretrain_vlm.py, and its arguments")
    return run_tool(lambda: run_traced(options.command, options.within))


def run_traced(command: list[str], within: str | None) -> int:
    """Run a script with its arguments and print the report; the script's exit code."""
    trace = Trace(within)
    former, sys.argv = sys.argv, command
    sys.path.insert(0, str(ROOT))
    sys.setprofile(trace)
    code: object = 0
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.setprofile(None)
        sys.argv = former
    print(trace.report())
    return code if isinstance(code, int) else int(code is not None)


if __name__ == "__main__":
    sys.exit(main())
