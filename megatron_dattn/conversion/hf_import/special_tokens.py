"""What a config.json says about its tokenizer: which ids begin and end a text.

A tokenizer of another model is often smaller than the embedding and fits it, so that nothing but
these ids tells the two apart. Where only the tokens differ this is no error: transformers writes
its classes' default ids into files, and chat models change the end token in one of the two places.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_dattn.conversion.io.hf_folder import ConfigValues
from megatron_dattn.errors import CheckpointError

logger = logging.getLogger(__name__)

SpecialTokens = Mapping[str, tuple[int, ...]]
"""Ids by `bos` and `eos`, where config.json names them."""


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
        if own[kind] not in ids:
            spelled = ", ".join(str(tokenizer.convert_ids_to_tokens(index)) for index in ids)
            logger.warning(
                "%s: config.json has %s_token_id %s (%s), the tokenizer %s (%s): the tokenizer's "
                "is used; if it is another model's, import again with the right one",
                *(folder, kind, _spell(ids), spelled, own[kind]),
                tokenizer.convert_ids_to_tokens(own[kind]),
            )


def _spell(ids: tuple[int, ...] | list[int]) -> str:
    return ", ".join(map(str, ids))
