"""The numbers that an evaluation has left, for the model card.

A JSON object of numbers by name, or of objects with a number `accuracy` or `score`, as the
quickstart's evaluation and `tools/evaluate.py` write them; everything else in it is passed over.
"""

import logging
from pathlib import Path

from megatron_dattn.errors import DataError
from megatron_dattn.runtime.untrusted_file import read_json_object

logger = logging.getLogger(__name__)

METRICS_FILE = "accuracy.json"
"""Where an evaluation may leave them in a run folder."""
_NESTED = ("accuracy", "score")

Metrics = dict[str, float]


def metrics_of_run(run_folder: Path, *, is_newest: bool = True) -> Metrics:
    """Of the run folder's own file, if it is there; a damaged one is passed over with a warning.

    Args:
        is_newest: whether the run's newest checkpoint is meant. The file does not say of which step
            it is, so it is not taken for another.
    """
    path = run_folder / METRICS_FILE
    if not path.is_file():
        return {}
    if not is_newest:
        logger.warning(
            "the model card goes without %s, which does not say of which step it is; name it with "
            "--metrics if it is of this one",
            path,
        )
        return {}
    try:
        return read_metrics(path)
    except DataError as error:
        logger.warning("the model card goes without %s: %s", path, error)
        return {}


def read_metrics(path: Path) -> Metrics:
    """Numbers by what the card calls them; a warning if there are none.

    Raises:
        DataError: the file is missing, cannot be read, or holds no JSON object.
    """
    try:
        content = read_json_object(path, DataError)
    except FileNotFoundError as error:
        raise DataError(f"metrics file {path} cannot be read: {error.strerror}") from None
    except DataError as error:
        raise DataError(f"metrics file {error}") from error
    metrics: Metrics = {}
    for name, value in content.items():
        if isinstance(value, dict):
            metrics |= {f"{name}, {of}": value[of] for of in _NESTED if _is_number(value.get(of))}
        elif _is_number(value):
            metrics[name] = value
    if not metrics:
        logger.warning(
            "%s gives the model card no line: it holds neither numbers by name nor objects with a "
            "number '%s'",
            path,
            "' or '".join(_NESTED),
        )
    return metrics


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
