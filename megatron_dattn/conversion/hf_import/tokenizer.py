"""The tokenizer: an `<image>` entry without a larger vocabulary, and whether it is the model's.

A vision-language model needs one token that marks an image's place. A reserved entry that no text
needs is renamed: Mistral v0.3 ships `[control_8]` and hundreds more, Nemo `<SPECIAL_n>`, Llama-3
`<|reserved_special_token_0|>`, Gemma `<unused0>`. Llama-2, Vicuna, Qwen and SmolLM2 reserve
nothing; there an entry is added behind the others. Its id may lie behind the embedding's last row:
images take the token's place before anything is embedded, in training and in our exported code.

A tokenizer of another model is often smaller than the embedding and fits it, so that nothing but
the ids that config.json names tells the two apart: which begin and end a text. Where only the
tokens differ this is no error: transformers writes its classes' default ids into files, and chat
models change the end token in one of the two places.
"""

import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

from megatron_dattn.conversion.io.hf_folder import ConfigValues, read_json
from megatron_dattn.conversion.io.tokenizer_files import (
    CHAT_TEMPLATE_FILE,
    SENTENCEPIECE_FILE,
    rename_piece,
)
from megatron_dattn.data.conversation import IMAGE_TOKEN
from megatron_dattn.data.tokenizer import load_tokenizer
from megatron_dattn.errors import CheckpointError

logger = logging.getLogger(__name__)

SpecialTokens = Mapping[str, tuple[int, ...]]
"""Ids by `bos` and `eos`, where config.json names them."""
TEKKEN_RESERVED = re.compile(r"<SPECIAL_(\d+)>")
"""In Mistral's Tekken tokenizers: Nemo, Small 3."""
RESERVED_NAMES = (
    re.compile(r"\[control_(\d+)\]"),
    re.compile(r"<\|reserved_special_token_(\d+)\|>"),
    re.compile(r"<unused(\d+)>"),
    TEKKEN_RESERVED,
)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    SENTENCEPIECE_FILE,
    CHAT_TEMPLATE_FILE,
    "generation_config.json",  # it says which tokens end an answer
)


def copy_tokenizer(source: Path, target: Path, *, begin: int | None = None) -> int:
    """Copy a fast tokenizer and make sure that it knows `<image>` as a special token.

    Args:
        begin: the token that begins a text, by the model's config.json, for a tokenizer that names
            none, as Qwen's.

    Returns:
        The id of `<image>`.

    Raises:
        CheckpointError: no tokenizer.json, or one that is damaged or is no tokenizer.
        ConfigError: the copy cannot be loaded.
    """
    if not (source / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{source} holds no tokenizer.json; save a fast tokenizer there "
            "(AutoTokenizer.from_pretrained(...).save_pretrained(...))"
        )
    content = _read_tokenizer(source / "tokenizer.json")
    target.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    entry = IMAGE_TOKEN if IMAGE_TOKEN in added else _reserved_entry(added)
    if entry is None:
        image_id = _append(target / "tokenizer.json")
    else:
        image_id = added[entry]
        for path in (target / name for name in TOKENIZER_FILES):
            if path.suffix == ".json" and path.is_file():
                _rewrite(path, lambda content: _renamed(content, entry))
        rename_piece(target / SENTENCEPIECE_FILE, image_id, IMAGE_TOKEN)
    settings = target / "tokenizer_config.json"
    if settings.is_file():
        _rewrite(settings, lambda content: _listed(content, image_id))
    if begin is not None:
        tokenizer = load_tokenizer(str(target), template="model")
        first = tokenizer.convert_ids_to_tokens(begin)
        if tokenizer.bos_token is None and settings.is_file():
            _rewrite(settings, lambda content: content | {"bos_token": first})
    return image_id


def _read_tokenizer(path: Path) -> dict[str, Any]:
    content = read_json(path)
    try:
        Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{path} holds no tokenizer: {reason}; download it again") from error
    return content


def _reserved_entry(added: dict[str, int]) -> str | None:
    """`[control_8]` where it exists (public Mistral models use it so), else the lowest id."""
    names = [name for name in added if any(p.fullmatch(name) for p in RESERVED_NAMES)]
    if not names:
        return None
    return "[control_8]" if "[control_8]" in names else min(names, key=lambda name: added[name])


def _append(path: Path) -> int:
    """Give `<image>` the id behind the last one."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)])
    tokenizer.save(str(path))
    return tokenizer.get_vocab()[IMAGE_TOKEN]


def _listed(config: dict[str, Any], image_id: int) -> dict[str, Any]:
    """A tokenizer_config.json that lists `<image>` among the added tokens, if it lists them at all.

    transformers 4 writes such a list. It goes before the one in tokenizer.json, so that a token
    which it lacks is none.
    """
    decoder = config.get("added_tokens_decoder")
    if not isinstance(decoder, dict) or str(image_id) in decoder:
        return config
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    entry = {"content": IMAGE_TOKEN, **flags, "special": True}
    return config | {"added_tokens_decoder": {**decoder, str(image_id): entry}}


def _rewrite(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    content = read_json(path)
    changed = change(content)
    if changed != content:
        path.write_text(json.dumps(changed, ensure_ascii=False, indent=1), encoding="utf-8")


def _renamed(node: Any, entry: str) -> Any:
    """Rename the entry wherever it stands, as a key (the vocabulary) or as a value.

    Where its properties are listed it becomes special: reserved entries are not always.
    """
    if isinstance(node, dict):
        content = {
            IMAGE_TOKEN if key == entry else key: _renamed(value, entry)
            for key, value in node.items()
        }
        is_entry = content.get("content") == IMAGE_TOKEN and "special" in content
        return content | {"special": True} if is_entry else content
    if isinstance(node, list):
        return [_renamed(item, entry) for item in node]
    return IMAGE_TOKEN if node == entry else node


def special_tokens(*configs: Mapping[str, Any]) -> SpecialTokens:
    """The ids in the first of these that has them.

    Raises:
        CheckpointError: one is no whole number.
    """
    named: dict[str, tuple[int, ...]] = {}
    for kind in ("bos", "eos"):
        for config in configs:
            ids = _ids(config, f"{kind}_token_id")
            if ids:
                named.setdefault(kind, ids)
    return named


def begin_token(named: SpecialTokens) -> int | None:
    """The id of the token that begins a text."""
    return next(iter(named.get("bos", ())), None)


def _ids(config: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """One or several; negative ones say that there is none."""
    value = config.get(name)
    listed = value if isinstance(value, list) else [] if value is None else [value]
    places = (ConfigValues({name: item}, "the model's config.json") for item in listed)
    return tuple(index for index in (place.whole(name) for place in places) if index >= 0)


def check_special_tokens(
    named: SpecialTokens, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Compare them with a tokenizer; warn if it begins or ends texts otherwise.

    Raises:
        CheckpointError: it has no such token at all.
    """
    known = set(tokenizer.get_vocab().values())
    own = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    for kind, ids in named.items():
        absent = [index for index in ids if index not in known]
        if absent:
            raise CheckpointError(
                f"{folder}: config.json has {kind}_token_id {_spell(ids)}, but the tokenizer has "
                f"no token {_spell(absent)} (its {kind}_token is {own[kind]}); they belong to "
                "different models"
            )
        if own[kind] is not None and own[kind] not in ids:
            spelled = ", ".join(str(tokenizer.convert_ids_to_tokens(index)) for index in ids)
            logger.warning(
                "%s: config.json has %s_token_id %s (%s), the tokenizer %s (%s): the tokenizer's "
                "is used; if it is another model's, import again with the right one",
                *(folder, kind, _spell(ids), spelled, own[kind]),
                tokenizer.convert_ids_to_tokens(own[kind]),
            )


def _spell(ids: tuple[int, ...] | list[int]) -> str:
    return ", ".join(map(str, ids))
