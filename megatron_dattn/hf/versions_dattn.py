"""Which versions of transformers this code was tested with, and that no other one is used unawares.

A new version may rename what it passes to a model: 5.24 did so with the cache, and models that took
any keyword answered nonsense without a word. So an untested version is an error at load.

This file travels with the exported weights and imports nothing but what transformers needs itself.
"""

import importlib.metadata
import os

from packaging.version import Version

# The oldest and the newest, tests/readers/versions.py has all. Processors before 5.10 have no hook
# for the place of an image and would pass ours over in silence; 5.10.0 was withdrawn.
OLDEST_TESTED, NEWEST_TESTED = "5.10.1", "5.24.0"
TESTED_RANGE = f">={OLDEST_TESTED},<={NEWEST_TESTED}"
OVERRIDE = "DATTN_ALLOW_UNTESTED_TRANSFORMERS"


def check_transformers() -> None:
    """Refuse a version that is older or newer than all that were tested.

    Raises:
        ImportError: naming the installed version, the tested ones and the remedies.
    """
    installed = importlib.metadata.version("transformers")
    is_tested = Version(OLDEST_TESTED) <= Version(installed) <= Version(NEWEST_TESTED)
    if not is_tested and os.environ.get(OVERRIDE) != "1":
        raise ImportError(
            f"transformers {installed} is installed, but the code of this model was tested with "
            f"{OLDEST_TESTED} to {NEWEST_TESTED}: pip install 'transformers{TESTED_RANGE}', or set "
            f"{OVERRIDE}=1 to try it all the same"
        )
