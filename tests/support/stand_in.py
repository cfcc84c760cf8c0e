"""Ranks that find a stand-in where a GPU machine has Transformer Engine or apex.

megatron-core looks for both when it is imported, and this process has imported it without. So a new
interpreter runs `run_distributed` with the stand-in's folder on its path.
"""

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.distributed import ROOT, run_distributed

STAND_INS = Path(__file__).parent / "stand_ins"


def run_with(package: str, fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """As `run_distributed`, with "te" or "apex" there.

    Raises:
        AssertionError: if a rank fails; the message has what it said.
    """
    with tempfile.TemporaryDirectory(prefix="stand-in-") as folder:
        call, answer = Path(folder) / "call", Path(folder) / "answer"
        call.write_bytes(pickle.dumps((fn, world_size, args)))
        path = os.pathsep.join([str(STAND_INS / package), str(ROOT)])
        run = subprocess.run(
            [sys.executable, "-m", __name__, str(call), str(answer)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert run.returncode == 0, run.stdout + run.stderr
        return pickle.loads(answer.read_bytes())


def main() -> None:
    call, answer = (Path(path) for path in sys.argv[1:])
    fn, world_size, args = pickle.loads(call.read_bytes())
    answer.write_bytes(pickle.dumps(run_distributed(fn, world_size, *args)))


if __name__ == "__main__":
    main()
