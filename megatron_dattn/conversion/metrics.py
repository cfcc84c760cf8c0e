"""The numbers that an evaluation has left, for the model card.

A JSON object of numbers by name, or of objects with a number `accuracy`, as the quickstart's
evaluation writes them; everything else in it is passed over.
"""

import json
import logging
from pathlib import Path

from megatron_dattn.errors import DataError

logger = logging.getLogger(__name__)

METRICS_FILE = "accuracy.json"
"""Where an evaluation may leave them in a run folder."""
_NESTED = "accuracy"

Metrics = dict[str, float]


def find_metrics(named: Path | None, run_folder: Path, *, is_newest: bool = True) -> Metrics:
    """What the model card shows.

    Args:
        named: the file that the user named; the run folder's own where None, if it is there. A
            damaged one of the run folder is passed over with a warning.
        is_newest: whether the run's newest checkpoint is meant. The run folder's file does not say
            of which step it is, so it is not taken for another.

    Raises:
        DataError: the named file is missing or damaged.
    """
    if named is not None:
        return _warned(named, read_metrics(named))
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
        return _warned(path, read_metrics(path))
    except DataError as error:
        logger.warning("the model card goes without %s: %s", path, error)
        return {}


def read_metrics(path: Path) -> Metrics:
    """Numbers by what the card calls them.

    Raises:
        DataError: the file is missing, cannot be read, or holds no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"metrics file {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"metrics file {path} is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise DataError(
            f"metrics file {path} must hold a JSON object of numbers by name, found "
            f"{type(content).__name__}"
        )
    metrics: Metrics = {}
    for name, value in content.items():
        if isinstance(value, dict) and _is_number(value.get(_NESTED)):
            metrics[f"{name}, {_NESTED}"] = value[_NESTED]
        elif _is_number(value):
            metrics[name] = value
    return metrics


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _warned(path: Path, metrics: Metrics) -> Metrics:
    if not metrics:
        logger.warning(
            "%s gives the model card no line: it holds neither numbers by name nor objects with a "
            "number '%s'",
            path,
            _NESTED,
        )
    return metrics
