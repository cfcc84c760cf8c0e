"""The frame of a command-line tool: its flags, how far it is, every foreseeable end in one line.

A wrong input, a full disk, Ctrl-C and the SIGTERM of a batch system all end here, with an exit
code. The signals raise in the tool's work, so that half-written outputs are removed on the way out.
"""

import argparse
import contextlib
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import takewhile
from types import FrameType
from typing import Any

from megatron_dattn.errors import EXIT_USER_ERROR, UserError, nearest_name
from megatron_dattn.runtime.log import escape_what_cannot_be_written, give_up_unwritable_output
from megatron_dattn.runtime.os_errors import explain, shortage
from megatron_dattn.runtime.progress import Advance

EXIT_OF_A_SIGNAL = 128  # plus its number, as shells report it: 130 for Ctrl-C


class ToolParser(argparse.ArgumentParser):
    """A parser of flags by their full names; of any other it says which one is nearest.

    argparse takes beginnings of names. A script that uses one ends, or means another flag, as soon
    as a second name begins so.
    """

    def __init__(self, description: str | None = None, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(description=description, allow_abbrev=False, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse unknown flags before missing ones are complained of."""
        given = sys.argv[1:] if args is None else list(args)
        for flag in (word.partition("=")[0] for word in self._own(given) if word.startswith("--")):
            if flag not in ("--", *self._option_string_actions):
                nearest = nearest_name(flag, self._option_string_actions)
                remedy = f"; the nearest is {nearest}" if nearest else ""
                self.error(f"unrecognized arguments: {flag}{remedy}")
        return super().parse_known_args(given, namespace)

    def _own(self, words: list[str]) -> Iterable[str]:
        """Those that are certainly not of a subcommand, which has its own parser, or a command, and
        do not stand behind `--`."""
        words = list(takewhile(lambda word: word != "--", words))
        rests = (argparse.PARSER, argparse.REMAINDER)
        is_whole = all(action.nargs not in rests for action in self._actions)
        return words if is_whole else takewhile(lambda word: word.startswith("--"), words)


class _Signals:
    """Context manager in which SIGINT and SIGTERM raise KeyboardInterrupt, and are remembered."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._former: dict[signal.Signals, object] = {}

    def __enter__(self) -> "_Signals":
        for number in (signal.SIGINT, signal.SIGTERM):
            # What nohup, or a shell for its background jobs, has switched off stays off.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._former[number] = signal.signal(number, self._interrupt)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        raise KeyboardInterrupt


def run_tool(work: Callable[[], int], left: Callable[[], str] = lambda: "") -> int:
    """Do a tool's work in the main thread; returns the exit code.

    Args:
        work: returns the exit code where nothing goes wrong.
        left: what is to be said behind `interrupted`, asked for after everything is cleaned up.
    """
    escape_what_cannot_be_written(sys.stdout)
    with _Signals() as signals:
        try:
            code = work()
            sys.stdout.flush()  # an answer that nobody gets is no success
            return code
        except KeyboardInterrupt:
            return _say_interrupted(signals, left)
        except UserError as error:
            message = str(error)
        except Exception as error:
            if signals.received is not None:  # an import can turn the interrupt into another error
                return _say_interrupted(signals, left)
            message = _in_words(error)
        finally:
            give_up_unwritable_output()
        _say(f"error: {message}")
        return EXIT_USER_ERROR


@contextlib.contextmanager
def bar(what: str, num_bytes: int) -> Iterator[Advance]:
    """A bar on standard error, where that is a terminal."""
    from tqdm import tqdm

    with tqdm(total=num_bytes, desc=what, unit="B", unit_scale=True, disable=None) as shown:
        yield shown.update


def _say_interrupted(signals: _Signals, left: Callable[[], str]) -> int:
    number = signals.received or signal.SIGINT
    by = "" if number == signal.SIGINT else f" by {number.name}"
    _say(f"interrupted{by}{left()}")
    return EXIT_OF_A_SIGNAL + number


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # the exit code says it too
        print(line, file=sys.stderr, flush=True)


def _in_words(error: Exception) -> str:
    """One line for what comes from outside; a bug of ours goes on as it is."""
    if isinstance(error, OSError):
        return explain(error)
    words = shortage(error)
    if words is None:
        raise error
    return words
