"""The names of a run's flags: full ones, Megatron's, those of older releases, and no others.

Megatron's own spelling works for every field whose name only one section has
(`--tensor-model-parallel-size 2` is `--parallel.tensor_model_parallel_size 2`); the table of these
names is read off the dataclasses. The beginning of a name is refused: a setting of a later release
may begin so, too, and a script would then end, or set another one.
"""

import dataclasses
import typing
from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Any

from megatron_dattn.config.pretrain import PretrainConfig
from megatron_dattn.config.renamed_keys import current_name
from megatron_dattn.errors import ConfigError, nearest_name
from megatron_dattn.yaml_files import fields_of


def expand_short_flags(argv: Sequence[str]) -> list[str]:
    """Rewrite Megatron's spelling of a field, and its old full name, into its full name.

    A flag of a boolean field may stand alone (`--sequence-parallel`), as in Megatron.

    Raises:
        ConfigError: the name is a field of several sections; the message lists the full names.
    """
    fields = _fields_by_name(PretrainConfig)
    expanded: list[str] = []
    for position, token in enumerate(argv):
        if not token.startswith("--"):
            expanded.append(token)
            continue
        flag, equals, value = token[2:].partition("=")
        paths = fields.get(flag.replace("-", "_"), {})
        if len(paths) > 1:
            choices = ", ".join(f"--{path}" for path in paths)
            raise ConfigError(f"--{flag} is ambiguous; write one of {choices}")
        if not paths:
            expanded.append(f"--{current_name(flag)}{equals}{value}")
            continue
        ((path, kind),) = paths.items()
        expanded.append(f"--{path}{equals}{value}")
        following = argv[position + 1 : position + 2]
        stands_alone = not following or following[0].startswith("--")
        if kind in (bool, bool | None) and not equals and stands_alone:
            expanded.append("true")
    return expanded


def _fields_by_name(config_class: type, prefix: str = "") -> dict[str, dict[str, type]]:
    """Field name -> {full name: type} over all leaf fields of nested dataclasses."""
    found: dict[str, dict[str, type]] = defaultdict(dict)
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        kind = hints[field.name]
        path = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            for name, paths in _fields_by_name(kind, f"{path}.").items():
                found[name].update(paths)
        else:
            found[field.name][path] = kind
    return dict(found)


def refuse_unknown_flags(argv: Sequence[str], options: Collection[str]) -> None:
    """Refuse a flag that is none of the options, as the parser calls them in full.

    Raises:
        ConfigError: it says which one is nearest.
    """
    for flag in (token.partition("=")[0] for token in argv if token.startswith("--")):
        name = flag.removesuffix("+")
        if name in ("--", *options) or _is_inside(name.removeprefix("--")):
            continue
        full = {f"--{path.rpartition('.')[2]}".replace("_", "-"): path for path in options}
        full |= {path: path for path in options}
        nearest = nearest_name(name, full)
        remedy = f"the nearest is {full[nearest]}" if nearest else "--help has all settings"
        raise ConfigError(f"unrecognized arguments: {flag}; {remedy}")


def _is_inside(name: str) -> bool:
    """True for `data.train.weight`, a field of what `--data.train+` has added last, and for
    `data.policies.missing_image`, a key of a mapping, whose own rules say which there are."""
    section, _, field = name.rpartition(".")
    kind = kind_at(section)
    is_mapping = typing.get_origin(kind) is dict
    return is_mapping or any(field in fields_of(item) for item in typing.get_args(kind))


def kind_at(name: str) -> Any:
    """Type of the section or field of this full name; None for any other name."""
    kind: Any = PretrainConfig
    for part in name.split("."):
        kind = fields_of(kind).get(part)
    return kind
