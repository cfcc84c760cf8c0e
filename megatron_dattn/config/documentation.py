"""Every setting with its type, its default and what it does, read off the dataclasses.

`--help` prints this, and `docs/settings.md` is made of it:

    python -m megatron_dattn.config.documentation > docs/settings.md

The text is the docstring beside each field, so that code, help and page cannot say different
things.
"""

import dataclasses
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import docstring_parser

from megatron_dattn.config.pretrain import PretrainConfig

_ABOUT = """\
# Settings

Every setting of `pretrain_vlm.py`, as `--help` prints them too. In a file a name's parts are nested
(`training: {seed: 1}`); on the command line it is one word (`--training.seed 1`), and a last part
that only one section has may stand alone, in Megatron's spelling (`--seed 1`). Files and flags
merge in the order in which they are written; an unknown name is an error. `data.train[]` is one
item of the list.

This page is made from the docstrings beside the fields by
`python -m megatron_dattn.config.documentation`.
"""


@dataclass(frozen=True)
class Setting:
    """One field that a user may set."""

    name: str
    """The full name, section first."""
    kind: str
    """Its type in words."""
    default: str
    text: str
    """What it does, in one paragraph."""


@dataclass(frozen=True)
class Section:
    """The settings of one dataclass."""

    name: str
    text: str
    settings: list[Setting]


def sections(config_class: type = PretrainConfig) -> Iterator[Section]:
    """All sections that hold settings themselves, in the order of the fields."""
    return _sections(config_class, "")


def _sections(config_class: type, name: str) -> Iterator[Section]:
    hints = typing.get_type_hints(config_class)
    about = docstring_parser.parse_from_object(config_class)
    texts = {p.arg_name: _one_line(p.description) for p in about.params}
    settings, inner = [], []
    for field in dataclasses.fields(config_class):
        path, kind = f"{name}.{field.name}".lstrip("."), hints[field.name]
        if _has_fields(kind):
            inner.append((kind, path))
        else:
            settings.append(Setting(path, _words(kind), _default(field), texts.get(field.name, "")))
            each = "[]" if typing.get_origin(kind) is list else ""
            inner += [(item, path + each) for item in typing.get_args(kind) if _has_fields(item)]
    if settings:
        yield Section(name, _one_line(about.short_description), settings)
    for kind, path in inner:
        yield from _sections(kind, path)


def _has_fields(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _one_line(text: str | None) -> str:
    """A docstring as one paragraph, with YAML's word for None."""
    return re.sub(r"\bNone\b", "null", " ".join((text or "").split()))


def _words(kind: Any) -> str:
    """A type as a user would say it."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words(part) for part in parts)
    if origin is typing.Literal:
        return " | ".join(map(str, parts))
    if origin is list:
        return f"list of {_words(parts[0])}"
    if origin is dict:
        return f"mapping of names to {_words(parts[1])}"
    if dataclasses.is_dataclass(kind):
        return f"{{{', '.join(field.name for field in dataclasses.fields(kind))}}}"
    return {types.NoneType: "null", bool: "true | false", str: "text"}.get(kind, kind.__name__)


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
        return str(value) if value else "none"
    value = field.default
    if value is dataclasses.MISSING:
        return "required"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else f"{value}"


def help_text(width: int = 100) -> str:
    """Of every setting, as `--help` prints it."""
    lines = []
    for section in sections():
        lines += ["", f"{section.name}: {section.text}"]
        for setting in section.settings:
            lines.append(f"  --{setting.name} ({setting.kind}; default {setting.default})")
            lines += textwrap.wrap(
                setting.text, width, initial_indent=" " * 6, subsequent_indent=" " * 6
            )
    return "\n".join(lines)


def page() -> str:
    """docs/settings.md."""
    parts = [_ABOUT]
    for section in sections():
        parts.append(f"## {section.name}\n\n{section.text}\n")
        parts.append("| setting | type | default | what it does |\n|---|---|---|---|")
        for setting in section.settings:
            cells = (f"`{setting.name}`", setting.kind, setting.default, setting.text)
            parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("")
    return "\n".join(parts)


if __name__ == "__main__":
    print(page(), end="")
