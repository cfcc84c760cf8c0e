"""Loading the tokenizer from a local folder, and refusing one that would not work.

Label masks come from character offsets, so a fast tokenizer is required. `<image>` and a template's
control tokens must each be one special token: a model trained on their spelled-out letters would
look alright and be wrong.
"""

import contextlib
import hashlib
import json
from functools import lru_cache
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_dattn.data.conversation import IMAGE_TOKEN
from megatron_dattn.data.templates import template_tokens
from megatron_dattn.errors import ConfigError
from megatron_dattn.runtime.untrusted_file import open_plain, read_json_object

# What transformers reads to make a tokenizer. (It takes the model's class from config.json.)
_JSON_FILES = (
    "config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
# They are parsed by another program, which says what is wrong with them.
_LARGE_FILES = ("tokenizer.json", "tokenizer.model")


def load_tokenizer(
    folder: str | None, *, template: str, vocab_size: int | None = None
) -> PreTrainedTokenizerBase:
    """Load and check a Hugging Face tokenizer.

    Args:
        folder: a local folder; nothing is ever downloaded and no code in it is run.
        template: the conversation template whose control tokens must exist.
        vocab_size: entries of the model's embedding, if known.

    Raises:
        ConfigError: naming what is missing and how to mend it.
    """
    if folder is None:
        raise ConfigError("data.tokenizer is not set: name the folder of a Hugging Face tokenizer")
    if not Path(folder).is_dir():
        raise ConfigError(f"data.tokenizer '{folder}' is not a folder")
    _check_files(Path(folder))
    try:
        tokenizer = _read_tokenizer(folder, _stamp(Path(folder)))
    except Exception as error:  # the tokenizers library raises nothing narrower
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"no tokenizer can be loaded from '{folder}': {reason}") from error
    check_tokenizer(tokenizer, folder=folder, template=template, vocab_size=vocab_size)
    return tokenizer


@lru_cache(maxsize=1)
def _read_tokenizer(folder: str, stamp: object) -> PreTrainedTokenizerBase:
    """One of 128,000 entries takes a second, and a start asks for it three times or more."""
    return AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, use_fast=True
    )


def _stamp(folder: Path) -> tuple[tuple[str, int, int, int], ...]:
    """Changes whenever a file of the folder does."""
    files = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
    return tuple((name, stat.st_ino, stat.st_mtime_ns, stat.st_size) for name, stat in files)


def _check_files(folder: Path) -> None:
    """Refuse what transformers would wait for, or stumble over in words of its own.

    Raises:
        ConfigError: a file that it reads is no plain one, or no JSON object.
    """
    for name in _JSON_FILES:
        with contextlib.suppress(FileNotFoundError):
            read_json_object(folder / name, ConfigError)
    for name in _LARGE_FILES:
        try:
            with contextlib.suppress(FileNotFoundError), open_plain(folder / name):
                pass
        except OSError as error:
            raise ConfigError(f"{folder / name} cannot be read: {error.strerror}") from error


def check_tokenizer(
    tokenizer: PreTrainedTokenizerBase, *, folder: str, template: str, vocab_size: int | None = None
) -> None:
    """Raise ConfigError unless the tokenizer is fast and knows all control tokens."""
    if not tokenizer.is_fast:
        raise ConfigError(
            f"the tokenizer in '{folder}' is a slow one, but label masks need character offsets; "
            "save it with a tokenizer.json"
        )
    special = special_token_ids(tokenizer)
    for token in (IMAGE_TOKEN, *template_tokens(template).control):
        if tokenizer.convert_tokens_to_ids(token) not in special:
            raise ConfigError(
                f"the tokenizer in '{folder}' has no special token '{token}', which template "
                f"'{template}' needs; rename one of its reserved tokens to it"
            )
    if tokenizer.eos_token is None or (tokenizer.bos_token is None and template != "model"):
        raise ConfigError(f"the tokenizer in '{folder}' lacks a bos_token or an eos_token")
    # `<image>` is taken out before tokens are embedded, so it needs no row.
    highest = max(index for token, index in tokenizer.get_vocab().items() if token != IMAGE_TOKEN)
    if vocab_size is not None and highest >= vocab_size:
        raise ConfigError(
            f"the tokenizer in '{folder}' has ids up to {highest}, but the model's vocab_size is "
            f"{vocab_size}; they belong to different models"
        )


def tokenizer_sha256(folder: str | None) -> str:
    """The sha256 of tokenizer.json, by which a checkpoint remembers its tokenizer.

    Raises:
        ConfigError: the folder or the file is missing.
    """
    if folder is None:
        raise ConfigError("data.tokenizer is not set: name the folder of a Hugging Face tokenizer")
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(
            f"{path} does not exist: data.tokenizer must name the folder of a fast Hugging Face "
            "tokenizer"
        )
    return hashlib.sha256(path.read_bytes()).hexdigest()


def generation_ends(folder: str, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Special tokens that end an answer, after the generation_config.json beside a tokenizer.

    Chat models end turns with a token of their own and texts with another (Llama-3: `<|eot_id|>`,
    `<|end_of_text|>`), and the tokenizer names one of them. What is not special there is left out:
    the line breaks that end an exported model's captions do not end other answers.

    Raises:
        ConfigError: the file is damaged.
    """
    path = Path(folder) / "generation_config.json"
    try:
        ends = read_json_object(path, ConfigError).get("eos_token_id")
    except FileNotFoundError:
        return frozenset()
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if any(isinstance(index, bool) or not isinstance(index, int) for index in listed):
        raise ConfigError(f"{path} has eos_token_id {json.dumps(ends)}, but it must be ids")
    return special_token_ids(tokenizer).intersection(listed)


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that only templates may produce. `<unk>` is not one: rare characters produce it."""
    added = tokenizer.added_tokens_decoder.items()
    ids = {index for index, token in added if token.special} | set(tokenizer.all_special_ids)
    return frozenset(ids - {tokenizer.unk_token_id})


def own_chat_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The Jinja source that came with a tokenizer: of several that for chats; None if none did."""
    source = tokenizer.chat_template
    if isinstance(source, dict):
        source = source.get("default")
    return source or None


def longest_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Characters of the longest token: no text has fewer tokens than its characters over this.

    That holds for tokenizers that keep every character, as those of language models do. Others may
    make one `<unk>` of any number of characters, or drop white space.
    """
    return max(map(len, tokenizer.get_vocab()))  # a byte-level token has a character per byte


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """The id of one token, which must exist."""
    index = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(index, int)
    return index


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills unused text tokens: the pad token, else `<unk>` (Mistral), else the end."""
    for index in (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id):
        if index is not None:
            return int(index)
    raise ConfigError("the tokenizer has neither a pad, nor an unk, nor an eos token")
