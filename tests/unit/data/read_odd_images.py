"""Run in a process of its own with little memory: read odd images, and say what became of each.

    python -m tests.unit.data.read_odd_images FOLDER NAMES.json FATES.json

A crash, a warning or a line on stderr is the caller's to find.
"""

import json
import resource
import sys

from megatron_dattn.data.image_conversions import read_image
from megatron_dattn.data.images import ImagePreprocessor
from megatron_dattn.data.policies import Fixes
from megatron_dattn.data.problems import FIXED_BY_DEFAULT
from megatron_dattn.data.rejection import SampleError
from megatron_dattn.runtime.log import quiet_libraries

SECONDS = 120  # of a core, for all files, which take two: a file that hangs is a crash
MEMORY = 512 * 2**20  # beyond what the interpreter and its libraries have


def _kilobytes(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key))


def main() -> None:
    folder, names, output = sys.argv[1:]
    quiet_libraries()
    resident = _kilobytes("VmRSS")
    limit = 1024 * _kilobytes("VmSize") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    tiles = ImagePreprocessor(32, image_fit="anyres")
    fates = {}
    with open(names) as file:
        for name in json.load(file):
            message = ""
            try:
                data = read_image(folder, name, Fixes(FIXED_BY_DEFAULT))
                assert len(tiles.squares(data)) == tiles.num_squares(data)
                fate = "good"
            except SampleError as error:
                fate, message = str(error.reason), str(error)
            fates[name] = (fate, message)
    with open(output, "w") as file:
        json.dump({"fates": fates, "grown": _kilobytes("VmHWM") - resident}, file)


if __name__ == "__main__":
    main()
