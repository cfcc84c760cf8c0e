"""What a Hugging Face folder may hold beside tokenizer.json: chat template, sentencepiece model.

chat_template.jinja makes prompts of chat messages. An export writes it; an import recognises its
own and knows what it was trained in.

tokenizer.model is made to say what tokenizer.json says, which is what transformers reads: older
releases rebuild the tokenizer from tokenizer.model in some cases, and other programs read nothing
else. An entry that is renamed in one of the two files alone is then another token, or none.
Llama-3 calls a file of another format by the same name; it has no special tokens, so it contradicts
nothing and is left as it is.
"""

import logging
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from megatron_dattn.data.templates import read_template

logger = logging.getLogger(__name__)

CHAT_TEMPLATE_FILE = "chat_template.jinja"
SENTENCEPIECE_FILE = "tokenizer.model"


def chat_template(template: str, own: str | None = None) -> str:
    """The Jinja source that makes prompts of chat messages.

    Training's template for captions takes an image and its caption; the exported one also makes a
    prompt of an image alone. A language model's own takes texts; the exported one also takes parts.

    Args:
        own: the template that came with the tokenizer, for template `model`.
    """
    if template == "plain":
        return _read("plain.jinja")
    if template != "model":
        return read_template(template)
    assert own is not None
    reading = _read("messages.jinja")
    return own if own.startswith(reading) else reading + own  # it may come from such an export


def write_chat_template(target: Path, source: str) -> None:
    """Write the one file of it: a second copy, in tokenizer_config.json, would only grow stale."""
    (target / CHAT_TEMPLATE_FILE).write_text(source, encoding="utf-8")


def _read(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def rename_piece(path: Path, index: int, name: str) -> None:
    """Call a piece by another name; nothing happens if there is no such file or piece."""
    model = _read_pieces(path)
    if model is None or index >= len(model.pieces) or model.pieces[index].piece == name:
        return
    model.pieces[index].piece = name
    path.write_bytes(model.SerializeToString())


def remove_if_contradicting(path: Path, vocabulary: dict[str, int]) -> None:
    """Remove the file, with a warning, if a piece of it is another token in the vocabulary.

    Entries that the vocabulary has behind the last piece are no contradiction: every program adds
    those from tokenizer.json or tokenizer_config.json.
    """
    model = _read_pieces(path)
    if model is None:
        return
    names = {index: token for token, index in vocabulary.items()}
    for index, piece in enumerate(model.pieces):
        if names.get(index) != piece.piece:
            logger.warning(
                "%s is left out: it calls id %d %r, and tokenizer.json %r",
                *(path.name, index, piece.piece, names.get(index)),
            )
            path.unlink()
            return


def _read_pieces(path: Path) -> Any:
    """The model, or None if the file is missing or of another format."""
    if not path.is_file():
        return None
    # Its classes are made when it is imported, so that type checkers do not see them.
    model = getattr(sentencepiece_model_pb2, "ModelProto")()  # noqa: B009
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError:
        return None
    return model
