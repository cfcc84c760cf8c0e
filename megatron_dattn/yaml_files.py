"""Reads YAML as its writer meant it: what a field expects decides what a word is.

YAML 1.1, which PyYAML reads, takes `off` and `no` for false, `1:30` for 90, `010` for 8 and `1e-5`
for text. A text field wants what stands there, a number field a number, and a switch takes on, off,
yes and no; so words are looked at together with the type of the field that they are given to.
Where nothing is known of a field, YAML 1.2's core schema holds.
"""

import dataclasses
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from megatron_dattn.errors import ConfigError

CONFIG_DIR = "${config_dir}"
"""At the beginning of a value: the folder of the file in which it stands. What a program writes
names the files beside it so, and the folder may be moved."""

_TAG = "tag:yaml.org,2002:"
_TAGGED = {
    f"{_TAG}{name}": kind for name, kind in {"int": int, "float": float, "bool": bool}.items()
}
_NULL = frozenset(("", "~", "null", "Null", "NULL"))
_CORE_SWITCHES = {"true": True, "false": False}
_SWITCHES = {**_CORE_SWITCHES, "on": True, "off": False, "yes": True, "no": False}
_DECIMAL = re.compile(r"[-+]?[0-9]+(_[0-9]+)*")
_PREFIXED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
# Without .inf and .nan: no setting can mean them, and comparisons let NaN pass.
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(_[0-9]+)*(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


class _Loader(yaml.SafeLoader):
    """Leaves every word as it stands."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - as its base declares it


def read_yaml(path: Path, kind: Any, other_fields: Mapping[str, Any] | None = None) -> Any:
    """Read a file whose content has the form of a type.

    Args:
        kind: a dataclass, TypedDict, list of one, or a plain type; Any where nothing is known.
        other_fields: types of keys that `kind` does not have, by full name (`section.key`).

    Returns:
        Dictionaries, lists and plain values; None for an empty file. They are not checked: what
        does not fit the type is left as text.

    Raises:
        ConfigError: the file cannot be read or is not YAML, a key stands twice in a mapping, or a
            tag is unknown.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"'{path}' does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"'{path}' cannot be read: {error}") from error
    return parse_yaml(
        text,
        kind,
        source=f"'{path}'",
        folder=path.absolute().parent,
        other_fields=other_fields,
    )


def parse_yaml(
    text: str,
    kind: Any,
    *,
    source: str,
    folder: Path | None = None,
    other_fields: Mapping[str, Any] | None = None,
) -> Any:
    """Read text as `read_yaml` does.

    Args:
        source: what the text is, for messages.
        folder: what `CONFIG_DIR` stands for.
        other_fields: as for `read_yaml`.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
        reader = _TypedReader(source, folder, other_fields or {})
        return None if node is None else reader.read(node, kind)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not YAML: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise ConfigError(f"{source} is not YAML: it is nested without end") from None


def plain_value(text: str, kind: Any) -> Any:
    """The value that an unquoted word has for a field.

    Args:
        kind: the field's type, a union or Literal too; Any where nothing is known.

    Raises:
        ConfigError: the field cannot hold text, and the word is neither number nor switch.
    """
    kinds = _alternatives(kind)
    if text in _NULL:
        return None
    if text in kinds:
        return text  # a word of a Literal
    if Any in kinds:
        return _plain_core_value(text)
    if bool in kinds and text.lower() in _SWITCHES:
        return _SWITCHES[text.lower()]
    if int in kinds and (whole := _integer(text)) is not None:
        return whole
    if float in kinds and _FLOAT.fullmatch(text):
        return float(text)
    if is_wordless(kind):
        wanted = [_in_words(part) for part in kinds if part is not types.NoneType]
        raise ConfigError(f"expected {' or '.join(wanted)}, got '{text:.100}'")
    return text


def is_wordless(kind: Any) -> bool:
    """True if no text can be given to it: numbers, switches, lists, mappings."""
    return all(
        part in (int, float, bool, types.NoneType) or _is_list(part) or _is_mapping(part)
        for part in _alternatives(kind)
    )


def _in_words(kind: Any) -> str:
    if _is_mapping(kind):
        names = [*list(fields_of(kind))[:3], "..."]
        return f"a mapping ({', '.join(names)})"
    return "a list" if _is_list(kind) else kind.__name__


def _plain_core_value(text: str) -> Any:
    if text in _CORE_SWITCHES:
        return _CORE_SWITCHES[text]
    if _DECIMAL.fullmatch(text) or _PREFIXED.fullmatch(text):
        return _integer(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def _integer(text: str) -> int | None:
    if _DECIMAL.fullmatch(text):
        return int(text)
    if _PREFIXED.fullmatch(text):
        return int(text, 0)
    if "." not in text and _FLOAT.fullmatch(text) and float(text).is_integer():
        return int(float(text))  # 1e6
    return None


def _alternatives(kind: Any) -> tuple[Any, ...]:
    """The types, and the values of Literals, that a union consists of."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return tuple(inner for part in typing.get_args(kind) for inner in _alternatives(part))
    if origin is typing.Literal:
        return typing.get_args(kind)
    return (kind,)


def fields_of(kind: Any) -> dict[str, Any]:
    """Name and type of each field of a dataclass or TypedDict; nothing for other types."""
    if dataclasses.is_dataclass(kind) or typing.is_typeddict(kind):
        return typing.get_type_hints(kind)
    return {}


@dataclass(frozen=True)
class _TypedReader:
    source: str
    folder: Path | None
    other_fields: Mapping[str, Any]

    def read(self, node: Node, kind: Any, name: str = "") -> Any:
        if isinstance(node, MappingNode):
            fields = next(filter(None, map(fields_of, _alternatives(kind))), {})
            content = {}
            for key, value in self._pairs(node).items():
                full = f"{name}.{key}" if name else key
                field = fields.get(key, self.other_fields.get(full, Any))
                content[key] = self.read(value, field, full)
            return content
        if isinstance(node, SequenceNode):
            items = [typing.get_args(part)[0] for part in _alternatives(kind) if _is_list(part)]
            return [self.read(item, items[0] if items else Any, name) for item in node.value]
        assert isinstance(node, ScalarNode)
        try:
            return self._scalar(node, kind)
        except ConfigError as error:
            raise self._error(node, f"{name}: {error}" if name else str(error)) from None

    def _scalar(self, node: ScalarNode, kind: Any) -> Any:
        if node.tag in _TAGGED:
            return plain_value(node.value, _TAGGED[node.tag])
        if node.tag == f"{_TAG}null":
            return None
        if node.tag != f"{_TAG}str":
            raise ConfigError(f"the tag {node.tag} is unknown")
        quoted = node.style and not is_wordless(kind)
        value = node.value if quoted else plain_value(node.value, kind)
        if isinstance(value, str) and value.startswith(CONFIG_DIR):
            if self.folder is None:
                raise ConfigError(f"{CONFIG_DIR} has a meaning in files only")
            return f"{self.folder}{value.removeprefix(CONFIG_DIR)}"
        return value

    def _pairs(self, node: MappingNode) -> dict[str, Node]:
        """Values by key; a merge key (`<<`) gives those that the mapping itself does not have."""
        own: dict[str, Node] = {}
        merged: dict[str, Node] = {}
        for key, value in node.value:
            if not isinstance(key, ScalarNode):
                raise self._error(key, "a key must be one word")
            if key.value == "<<" and not key.style:
                for name, inner in self._merged(value):
                    merged.setdefault(name, inner)
            elif key.value in own:
                raise self._error(key, f"'{key.value}' stands twice in one mapping")
            else:
                own[key.value] = value
        return {**merged, **own}

    def _merged(self, node: Node) -> Iterator[tuple[str, Node]]:
        for mapping in node.value if isinstance(node, SequenceNode) else [node]:
            if not isinstance(mapping, MappingNode):
                raise self._error(mapping, "<< takes a mapping or a list of them")
            yield from self._pairs(mapping).items()

    def _error(self, node: Node, what: str) -> ConfigError:
        line = "" if self.folder is None else f", line {node.start_mark.line + 1}"
        return ConfigError(f"{self.source}{line}: {what}")


def _is_mapping(kind: Any) -> bool:
    return bool(fields_of(kind)) or typing.get_origin(kind) is dict


def _is_list(kind: Any) -> bool:
    return typing.get_origin(kind) is list
