"""What the fields of a manifest must be, whoever wrote it.

Its own sum proves that a manifest is as it was written, not that this program wrote it. File names
become paths and facts become settings, so each is of its type here or the checkpoint is refused.
"""

import re
from collections.abc import Mapping
from typing import Any

from megatron_dattn.errors import CheckpointError
from megatron_dattn.runtime.untrusted_file import JsonFields, is_number, show

FIELDS = ("step", "facts", "layout", "files", "versions", "created")
_FILE_NAME = re.compile(r"[A-Za-z0-9_.-]{1,255}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def check_fields(body: Mapping[str, Any], where: str, own_name: str) -> None:
    """Check the body of a manifest, without its format and its sum.

    Args:
        where: what messages call it.
        own_name: of its file, which it does not list.

    Raises:
        CheckpointError: naming the field that is missing, unknown or of another type.
    """
    unknown = sorted(body.keys() - set(FIELDS))
    if unknown:
        raise CheckpointError(
            f"{where} has fields that this version does not know ({', '.join(unknown)}); load it "
            "with the version that wrote it"
        )
    fields = JsonFields(body, where, CheckpointError)
    fields.whole("step", least=0)
    fields.text("created")
    layout = JsonFields(fields.section("layout"), f"{where}: layout", CheckpointError)
    for axis in layout.values:
        layout.whole(axis, least=1)
    versions = JsonFields(fields.section("versions"), f"{where}: versions", CheckpointError)
    for package in versions.values:
        versions.text(package)
    _check_files(JsonFields(fields.section("files"), f"{where}: files", CheckpointError), own_name)
    _check_facts(JsonFields(fields.section("facts"), f"{where}: facts", CheckpointError))


def _check_files(files: JsonFields, own_name: str) -> None:
    for name in files.values:
        if not _FILE_NAME.fullmatch(name) or name in (".", "..", own_name):
            raise CheckpointError(
                f"{files.where} lists {show(name)}, which is not the name of a file in the "
                "checkpoint's folder; do not use this checkpoint"
            )
        record = JsonFields(files.section(name), f"{files.where}: {name}", CheckpointError)
        record.whole("size", least=0)
        if not _SHA256.fullmatch(record.text("sha256")):
            raise record.wrong("sha256", "64 hexadecimal digits")
        if len(record.values) != 2:
            raise files.wrong(name, "a size and a sha256")


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_counters(value: Any) -> bool:
    return isinstance(value, dict) and all(type(count) is int for count in value.values())


def _is_validation(value: Any) -> bool:
    # A loss may be infinite, or not a number.
    return (
        isinstance(value, dict)
        and type(value.get("step")) is int
        and (is_number(value.get("loss")) or isinstance(value.get("loss"), float))
    )


def _is_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _is_model(value: Any) -> bool:
    """Settings by part of the model, which are compared field by field elsewhere."""
    return isinstance(value, dict) and isinstance(value.get("language", {}), dict)


# The facts that this program reads, where they are there. Others are plain JSON.
_FACTS = {
    "model": (_is_model, "settings by part"),
    "modules": (_is_names, "a list of names"),
    "has_added": (lambda value: isinstance(value, bool), "true or false"),
    "tokenizer": (lambda value: isinstance(value, str), "a string"),
    "stage": (lambda value: isinstance(value, str), "a string"),
    "recipe": (lambda value: isinstance(value, dict), "an object"),
    "step": (lambda value: type(value) is int, "a whole number"),
    "progress": (_is_counters, "whole numbers by name"),
    "data_sets": (_is_names, "a list of names"),
    "sources": (_is_texts, "paths by name"),
    "validation": (_is_validation, "a step and a loss"),
    "loader": (_is_counters, "whole numbers by name"),
    "parent": (lambda value: isinstance(value, dict), "an object"),
}
# They are null where there is nothing to tell.
_MAY_BE_NULL = ("validation", "loader", "parent")
# Of a parent everything that it does not remember itself is null.
_OF_A_PARENT = ("stage", "step", "data_sets", "sources", "parent")


def _check_facts(facts: JsonFields, may_be_null: tuple[str, ...] = _MAY_BE_NULL) -> None:
    for name, (is_right, expected) in _FACTS.items():
        value = facts.values.get(name)
        if name not in facts.values or (value is None and name in may_be_null):
            continue
        if not is_right(value):
            raise facts.wrong(name, expected)
        if name == "parent":
            inner = JsonFields(facts.section(name), f"{facts.where}: parent", facts.error)
            _check_facts(inner, _OF_A_PARENT)
