"""Keys that earlier files and commands use, under the names that they have now.

A run folder keeps its configuration beside its checkpoints for as long as they live, so a file that
an older version wrote is still read, and a script that gives an old flag still runs. Nothing writes
the old names.
"""

from typing import Any

from megatron_dattn.errors import ConfigError

RENAMED = {
    "training.savings.unread_rows": "training.savings.unread_tokens",
    "training.savings.ffn_chunk_rows": "training.savings.ffn_chunk_tokens",
    "training.precision": "execution.precision",
    "training.recompute": "execution.recompute",
    "training.attention_backend": "execution.attention_backend",
    "training.transformer_impl": "execution.transformer_impl",
    "training.fp8": "execution.fp8",
    "training.savings": "execution.savings",
}
"""In the order in which the names changed: a key may have been renamed and moved since."""


def current_name(key: str) -> str:
    """Today's full name of a setting or section; any other key as it is."""
    for old, new in RENAMED.items():
        if f"{key}.".startswith(f"{old}."):
            key = new + key.removeprefix(old)
    return key


def with_current_keys(content: dict[str, Any]) -> dict[str, Any]:
    """The same sections with every old key moved to its present place.

    Raises:
        ConfigError: a file gives a value under both names.
    """
    content = _copied(content)
    for old, new in RENAMED.items():
        *sections, name = old.split(".")
        inner: Any = content
        for section in sections:
            inner = inner.get(section) if isinstance(inner, dict) else None
        if isinstance(inner, dict) and name in inner:
            _put(content, new, inner.pop(name), old)
    return content


def _copied(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _copied(value) for name, value in content.items()}
    return content


def _put(content: dict[str, Any], key: str, value: Any, old: str) -> None:
    *sections, name = key.split(".")
    for section in sections:
        inner = content.get(section) or {}
        content[section] = inner
        content = inner
    if name in content:
        raise ConfigError(f"{old} is the old name of {key}; both are given, leave {old} out")
    content[name] = value
