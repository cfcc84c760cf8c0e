"""Whether two descriptions are of the same model: one answer for all who ask.

A description is plain data, as a checkpoint's manifest holds it: `model` (`asdict(ModelConfig)`)
beside tokenizer, stage, recipe. All fields must be equal but those that `_MAY_DIFFER` frees for the
purpose of the question.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from megatron_dattn.attention import PRESETS
from megatron_dattn.errors import CheckpointError
from megatron_dattn.models.added_parameters import holds_preset
from megatron_dattn.models.config import ModelConfig, default_norm, norm_of_older_name

Facts = Mapping[str, Any]
Purpose = Literal["resume", "start from", "answer with", "compare with"]
"""Go on with a run; begin a stage from weights; generate, export; compute beside a foreign folder,
which then is what is stored."""

_ALWAYS: tuple[Purpose, ...] = ("resume", "start from", "answer with", "compare with")
_Lack = Literal["what a preset adds", "the adapter"]


@dataclass(frozen=True)
class _Free:
    """Fields of the model that may differ; a name stands for all that is below it, too."""

    fields: tuple[str, ...]
    purposes: tuple[Purpose, ...]
    if_stored_lacks: _Lack | None = None


_MAY_DIFFER = (
    # Nothing depends on them once there are weights.
    _Free(("language.max_position_embeddings", "adapter.text_scale"), _ALWAYS),
    # Layers above the one that feeds the adapter change no output (`described` counts those below
    # it), nor do initial values.
    _Free(
        ("vision.num_hidden_layers", "vision.feature_layer", "language.initializer_range"),
        ("compare with",),
    ),
    # Weights from elsewhere: no preset has shaped them, so any may start from them.
    _Free(
        (
            *("attention", "adapter.max_grid", "adapter.num_places", "adapter.visual_position"),
            "adapter.norm_eps",  # an adapter from elsewhere has no norm
        ),
        ("start from", "answer with", "compare with"),
        if_stored_lacks="what a preset adds",
    ),
    # Two pretrained halves: the first stage makes the adapter.
    _Free(("adapter",), ("start from",), if_stored_lacks="the adapter"),
)
# What models had before they could have something else; checkpoints of then do not say it.
_BEFORE_THE_FIELD: dict[str, dict[str, Any]] = {
    "language": {"rope_scaling": None},
    "adapter": {"norm": None, "num_places": None, "visual_position": "row_column"},
}
_ABSENT = object()


@dataclass(frozen=True)
class Difference:
    """A field, by its dotted name, and its value on either side as words."""

    name: str
    ours: str
    stored: str


def differences(ours: Facts, stored: Facts, purpose: Purpose) -> list[Difference]:
    """Fields whose difference the purpose forbids, by name.

    Args:
        ours: what is wanted; only the facts that it has are compared.
        stored: all that is known of the weights; `modules` and `has_added` say what they lack.
    """
    wanted = _flat(ours)
    present = _flat({name: stored[name] for name in ours if name in stored})
    free = {f"model.{name}" for name in _free_fields(stored, purpose)}
    return [
        Difference(name, _show(wanted, name), _show(present, name))
        for name in sorted(wanted.keys() | present.keys())
        if wanted.get(name, _ABSENT) != present.get(name, _ABSENT)
        and free.isdisjoint(_with_parents(name))
    ]


def require_same(
    ours: Facts, stored: Facts, purpose: Purpose, *, complaint: str, remedy: str
) -> None:
    """Raise CheckpointError, naming every forbidden difference with both values.

    Args:
        complaint: what a difference means; the error begins with it.
        remedy: what the user can do; the error ends with it.
    """
    us, them = ("this run", "the checkpoint")
    if purpose == "compare with":
        us, them = ("the checkpoint", "the folder")
    lines = [
        f"{field.name}: {us} has {field.ours}, {them} {field.stored}"
        for field in differences(ours, stored, purpose)
    ]
    if lines:
        raise CheckpointError(f"{complaint}: {'; '.join(lines)}; {remedy}")


def described(model: ModelConfig) -> dict[str, Any]:
    """The facts of a model, with what it leaves to its other fields by value: two models that
    compute the same are equal in them."""
    positions, facts = model.visual_embedding, asdict(model)
    facts["vision"]["num_used_layers"] = model.vision.num_used_layers
    facts["adapter"] |= {
        "norm": model.adapter_norm,
        "hidden_size": model.adapter.hidden_size or model.language.hidden_size,
        "visual_position": positions,
        "max_grid": model.adapter.max_grid if positions == "row_column" else None,
        "num_places": model.num_places if positions in ("per_patch", "fractional") else None,
    }
    return {"model": facts}


def _free_fields(stored: Facts, purpose: Purpose) -> Iterator[str]:
    lacks = {
        None: True,
        "what a preset adds": not holds_preset(stored),
        "the adapter": "adapter" not in stored.get("modules", ()),
    }
    for free in _MAY_DIFFER:
        if purpose in free.purposes and lacks[free.if_stored_lacks]:
            yield from free.fields


def _with_parents(name: str) -> list[str]:
    """`a.b.c`, `a.b` and `a`."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]


def _flat(facts: Facts) -> dict[str, Any]:
    """Values by dotted name, as JSON has them."""
    return _flatten(json.loads(json.dumps(_with_later_fields(facts))))


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flatten(item, f"{prefix}.{key}" if prefix else key)
    return flat


def _show(flat: Mapping[str, Any], name: str) -> str:
    return repr(flat[name]) if name in flat else "nothing"


def _with_later_fields(facts: Facts) -> Facts:
    """The facts of a model that also has the fields made after its checkpoint, and that says by its
    own name what it had left to its preset."""
    if "model" not in facts:
        return facts
    model = dict(facts["model"])
    known = {part: later for part, later in _BEFORE_THE_FIELD.items() if part in model}
    model |= {part: known[part] | model[part] for part in known}
    if "adapter" in model:
        model["adapter"] = _with_norm(model["adapter"], model.get("attention"))
    return {**facts, "model": model}


def _with_norm(adapter: Mapping[str, Any], attention: str | None) -> dict[str, Any]:
    norm = adapter["norm"]
    if adapter.get("input_norm") is not None:
        norm = norm_of_older_name(adapter["input_norm"])
    if norm is None and attention in PRESETS:
        norm = default_norm(attention)
    return {name: value for name, value in adapter.items() if name != "input_norm"} | {"norm": norm}
