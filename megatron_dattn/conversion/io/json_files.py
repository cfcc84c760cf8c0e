"""Reads the small JSON files of a Hugging Face folder."""

from pathlib import Path
from typing import Any

from megatron_dattn.errors import CheckpointError
from megatron_dattn.runtime.json_file import read_json_object


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        CheckpointError: the file is missing, is no plain file, or is not a JSON object.
    """
    try:
        return read_json_object(path, CheckpointError)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: is this a Hugging Face folder?") from None
