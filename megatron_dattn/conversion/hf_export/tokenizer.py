"""The tokenizer of an export: training's, in files that every reader understands alike.

tokenizer.json is the very tokenizer that training used, and the generic class takes it as it is: a
class of a model's own would rebuild parts of it by rules that differ between releases. What each
release needs to know besides stands in one file, tokenizer_config.json, in words that transformers
4 and 5 both read.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_dattn.conversion.io.tokenizer_files import (
    SENTENCEPIECE_FILE,
    remove_if_contradicting,
    rename_piece,
)
from megatron_dattn.data.conversation import IMAGE_TOKEN
from megatron_dattn.data.tokenizer import special_token_ids, token_id


def write_tokenizer(
    tokenizer: PreTrainedTokenizerBase, source: Path, target: Path, *, pad_token: str
) -> None:
    """Write tokenizer.json, tokenizer_config.json and, if the run has one, tokenizer.model.

    Prompts are padded on the left, by the given token. No token is added to a text: the chat
    template writes the first one, and a tokenizer that adds it gives texts of the template two.

    Args:
        source: the run's folder of it.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["post_processor"] = _adding_nothing(content["post_processor"])
    text = json.dumps(content, ensure_ascii=False, indent=1)
    (target / "tokenizer.json").write_text(text, encoding="utf-8")
    text = json.dumps(_config(tokenizer, pad_token), ensure_ascii=False, indent=2)
    (target / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
    if (source / SENTENCEPIECE_FILE).is_file():
        path = target / SENTENCEPIECE_FILE
        shutil.copyfile(source / SENTENCEPIECE_FILE, path)
        rename_piece(path, token_id(tokenizer, IMAGE_TOKEN), IMAGE_TOKEN)
        remove_if_contradicting(path, tokenizer.get_vocab())


def _config(tokenizer: PreTrainedTokenizerBase, pad_token: str) -> dict[str, Any]:
    named = {
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "unk_token": tokenizer.unk_token,
        "pad_token": pad_token,
    }
    special = tokenizer.convert_ids_to_tokens(sorted(special_token_ids(tokenizer)))
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: token for name, token in named.items() if token is not None},
        # Not `extra_special_tokens`: transformers 4 has a dictionary there.
        "additional_special_tokens": [t for t in special if t not in named.values()],
        "clean_up_tokenization_spaces": bool(tokenizer.clean_up_tokenization_spaces),
        # The generic class of transformers 4 would add token types, which no model here takes.
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": tokenizer.model_max_length,
        "padding_side": "left",
    }


def _adding_nothing(processor: dict[str, Any] | None) -> dict[str, Any] | None:
    """What is left of a post-processor without its tokens: the offsets of byte-level tokenizers."""
    if processor is None or processor["type"] == "ByteLevel":
        return processor
    if processor["type"] == "Sequence":
        parts = [part for part in map(_adding_nothing, processor["processors"]) if part]
        return {**processor, "processors": parts} if parts else None
    return None
