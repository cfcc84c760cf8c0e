"""Energon is imported with its doors closed."""

import os
import pickle
import subprocess
import sys

import pytest

PROBE = """
import webdataset.utils
import megatron_dattn.data.energon
from megatron.core.msc_utils import MultiStorageClientFeature
from webdataset.autodecode import decoders
assert webdataset.utils.enforce_security
assert not MultiStorageClientFeature.is_enabled()
"""


def test_even_an_earlier_import_of_webdataset_is_secured() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "WDS_SECURE"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROBE],
        env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_webdataset_refuses_pickles() -> None:
    from webdataset.autodecode import decoders

    import megatron_dattn.data.energon  # noqa: F401

    with pytest.raises(ValueError, match="Unpickling is not allowed"):
        decoders["pyd"](pickle.dumps({}))
