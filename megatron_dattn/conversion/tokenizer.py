"""The tokenizer's `<image>` entry, made without growing the vocabulary.

A vision-language model needs one token that marks an image's place. Growing the vocabulary would
change the embedding's shape, so a reserved entry that no text can produce is renamed: Mistral v0.3
ships `[control_8]` and hundreds more, Llama-3 `<|reserved_special_token_0|>`.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from megatron_dattn.conversion.safetensors_reader import read_json
from megatron_dattn.data.conversation import IMAGE_TOKEN
from megatron_dattn.errors import CheckpointError

RESERVED_NAMES = (
    re.compile(r"\[control_(\d+)\]"),
    re.compile(r"<\|reserved_special_token_(\d+)\|>"),
)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "chat_template.jinja",
)


def copy_tokenizer(source: Path, target: Path) -> int:
    """Copy a fast tokenizer and make sure that it knows `<image>`.

    Returns:
        The id of `<image>`.

    Raises:
        CheckpointError: no tokenizer.json, or no entry that could be renamed.
    """
    if not (source / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{source} holds no tokenizer.json; save a fast tokenizer there "
            "(AutoTokenizer.from_pretrained(...).save_pretrained(...))"
        )
    target.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    tokenizer = read_json(target / "tokenizer.json")
    added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    if IMAGE_TOKEN in added:
        return added[IMAGE_TOKEN]
    reserved = _reserved_entry(added, source)
    for name in TOKENIZER_FILES:
        path = target / name
        if path.suffix == ".json" and path.is_file():
            content = _rename(read_json(path), reserved)
            path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    return added[reserved]


def _reserved_entry(added: dict[str, int], source: Path) -> str:
    """`[control_8]` where it exists (public Mistral models use it so), else the lowest id."""
    names = [name for name in added if any(p.fullmatch(name) for p in RESERVED_NAMES)]
    if not names:
        raise CheckpointError(
            f"{source}/tokenizer.json has no '{IMAGE_TOKEN}' and no reserved entry to rename "
            "(such as [control_8]); add the token and resize the embedding first"
        )
    return "[control_8]" if "[control_8]" in names else min(names, key=lambda name: added[name])


def _rename(node: Any, reserved: str) -> Any:
    """Rename the entry wherever it stands, as a key (the vocabulary) or as a value."""
    if isinstance(node, dict):
        return {
            IMAGE_TOKEN if key == reserved else key: _rename(value, reserved)
            for key, value in node.items()
        }
    if isinstance(node, list):
        return [_rename(item, reserved) for item in node]
    return IMAGE_TOKEN if node == reserved else node
