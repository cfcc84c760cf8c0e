"""Where an import comes from: what the folders hold, in our terms.

An import is made of an encoder and a language model (`two_model_source`) or of one vision-language
model (`vlm_source.py`). Both are described by an `ImportSource`, and everything after that is the
same. Only configurations and headers are read here.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_dattn.conversion.families import registry
from megatron_dattn.conversion.families.weight_map import Rule, check_tensors
from megatron_dattn.conversion.hf_import.tokenizer import SpecialTokens, special_tokens
from megatron_dattn.conversion.io.hf_folder import read_model_config
from megatron_dattn.conversion.io.safetensors_reader import (
    DTYPE_NAMES,
    SafetensorsFolder,
)
from megatron_dattn.errors import CheckpointError
from megatron_dattn.models.config import LanguageConfig, ModelConfig

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
"""What a language model's folder calls the two that may be tied."""
_FLOATING = frozenset(DTYPE_NAMES.values())


@dataclass(frozen=True)
class ModuleWeights:
    """The weights of one module, and the rules that take them over."""

    name: str
    weights: SafetensorsFolder
    rules: list[Rule]


@dataclass(frozen=True)
class ImportSource:
    """What is imported; its tensors have been compared with its config."""

    model: ModelConfig
    modules: list[ModuleWeights]
    folders: dict[str, Path]
    """By module, or under the name `model` if one folder holds all of them."""
    tokenizer: Path
    """The folder of the tokenizer."""
    image_processor: Path
    """The folder of the image processor."""
    has_added: bool = False
    """Whether the weights hold what the attention preset adds to a plain model."""
    data: dict[str, Any] = field(default_factory=dict)
    """Settings of how images were made squares, which the image processor does not say."""
    image_token_id: int | None = None
    """What the config says it is."""
    special_tokens: SpecialTokens = field(default_factory=dict)
    """What the config says about the tokenizer."""


@contextmanager
def language_folder(path: Path) -> Iterator[Path]:
    """The folder of a language model: the given one, or what a GGUF file holds, until the end.

    Raises:
        CheckpointError: a GGUF file that cannot be read.
    """
    if path.suffix != ".gguf":
        yield path
        return
    from megatron_dattn.conversion.io.gguf_file import unpacked

    with unpacked(path) as folder:
        yield folder


def two_model_source(
    vision: Path, language: Path, attention: str, origin: Path | None = None
) -> ImportSource:
    """An encoder and a language model.

    Args:
        origin: what the language model's folder was made of, where it is a temporary one.

    Raises:
        CheckpointError: a folder does not hold what its config.json describes.
        ConfigError: sizes or a preset that do not fit each other.
    """
    vision_json, language_json = (read_model_config(folder) for folder in (vision, language))
    model = ModelConfig(
        vision=registry.vision_family(vision_json).vision_config(vision_json),
        language=registry.language_family(language_json).language_config(language_json),
        attention=attention,
    )
    modules = [
        _vision_weights(vision, vision_json, model),
        _language_weights(language, language_json, model),
    ]
    folders = {"vision_model": vision, "language_model": origin or language}
    return ImportSource(
        model,
        modules,
        folders,
        tokenizer=language,
        image_processor=vision,
        special_tokens=special_tokens(language_json),
    )


def _vision_weights(folder: Path, config: dict[str, Any], model: ModelConfig) -> ModuleWeights:
    family = registry.vision_family(config)
    is_dual_encoder = "vision_config" in config
    weights = SafetensorsFolder(folder, prefix="vision_model." if is_dual_encoder else "")
    if not is_dual_encoder and any(name.startswith("vision_model.") for name in weights.shapes):
        # transformers 4 kept the prefix in files of the vision encoder alone.
        weights = SafetensorsFolder(folder, prefix="vision_model.")
    check_num_layers(model.vision.num_hidden_layers, weights)
    rules = family.vision_rules(model.vision)
    unused = family.unused_prefixes(model.vision, model.vision.num_hidden_layers)
    check_weights(rules, weights, unused)
    return ModuleWeights("vision_model", weights, rules)


def _language_weights(folder: Path, config: dict[str, Any], model: ModelConfig) -> ModuleWeights:
    family = registry.language_family(config)
    weights = SafetensorsFolder(folder)
    check_num_layers(model.language.num_hidden_layers, weights)
    rules = family.language_rules(model.language)
    head = repeated_head(weights, model.language, HEAD, EMBEDDING)
    check_weights(rules, weights, [*family.unused_prefixes(model.language), *head])
    return ModuleWeights("language_model", weights, rules)


def check_num_layers(num_layers: int, weights: SafetensorsFolder) -> None:
    """Raise CheckpointError if a folder cannot hold so many layers: each has several tensors.

    The tensors of every layer are listed and compared afterwards; a number that a damaged
    config.json has made a million must not become a list first.
    """
    if num_layers > len(weights.shapes):
        raise CheckpointError(
            f"{weights.folder}: config.json describes {num_layers} layers, but there are only "
            f"{len(weights.shapes)} tensors; download both again"
        )


def repeated_head(
    weights: SafetensorsFolder, language: LanguageConfig, head: str, embedding: str
) -> list[str]:
    """A tied model's head where the folder stores it again, as some programs do; else nothing.

    Args:
        head, embedding: what the folder calls them.

    Raises:
        CheckpointError: it is not the embedding.
    """
    if not language.tie_word_embeddings or not {head, embedding} <= weights.shapes.keys():
        return []
    if weights.dtypes[embedding] in _FLOATING and not weights.are_equal(head, embedding):
        raise CheckpointError(
            f"{weights.folder} stores {head} and {embedding} with different values, but its "
            "config.json ties them; if the head is a trained one set tie_word_embeddings to "
            f"false, otherwise save the model without {head}"
        )
    return [head]


def check_weights(rules: Sequence[Rule], weights: SafetensorsFolder, unused: Sequence[str]) -> None:
    """Raise CheckpointError unless a folder holds what the rules need, as numbers to train on.

    Args:
        unused: as for `check_tensors`.
    """
    check_tensors(rules, weights.shapes, unused=unused, origin=str(weights.folder))
    for name in (name for rule in rules for name in rule.sources):
        if weights.dtypes[name] not in _FLOATING:
            raise CheckpointError(
                f"{weights.folder} holds {name} as {weights.dtypes[name]}: quantized weights "
                "cannot be trained; convert the model in BF16 or FP32"
            )
