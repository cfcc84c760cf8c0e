"""One environment for each version of transformers, with that version's own requirements.

torch, gigabytes of it on machines with a GPU, is read from the environment that runs this: its
folder stands last on the path, behind everything that the new environment has itself.
"""

import subprocess
import sys
from pathlib import Path

import torch

from tests.readers.versions import COMPANIONS

_MARKER = ".installed"


def python_of(version: str, root: Path) -> Path:
    """The interpreter of a version's environment, made when it is not there yet.

    Args:
        root: the folder of all environments.

    Raises:
        subprocess.CalledProcessError: pip found no such version, or no index.
    """
    folder = root / version
    python, marker = folder / "bin" / "python", folder / _MARKER
    packages = [f"transformers=={version}", *COMPANIONS]
    wanted = "\n".join([*packages, sys.version, torch.__version__])
    if marker.is_file() and marker.read_text() == wanted:
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", folder], check=True)
    (packages_folder,) = folder.glob("lib/python*/site-packages")
    (packages_folder / "torch_of_maker.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    # The packages themselves, also where the maker has the same versions; then what they need.
    own = ["install", "--quiet", "--no-deps", "--ignore-installed", *packages]
    subprocess.run([*pip, *own], check=True)
    subprocess.run([*pip, "install", "--quiet", *packages], check=True)
    marker.write_text(wanted)
    return python
