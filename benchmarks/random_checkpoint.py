"""Hugging Face folders of real shapes and random values, for measurements without a download.

The tensors are those of Mistral-7B-v0.3 and of SigLIP so400m, in safetensors shards with an index,
written block by block, so that any size costs little memory. The values repeat a block of random
numbers: nothing in a conversion depends on them.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from megatron_dattn.checkpoint import find_checkpoint, save_checkpoint
from megatron_dattn.checkpoint.share import parameter_shards, values_by_name
from megatron_dattn.checkpoint.tensors import open_tensors
from megatron_dattn.config.cli import load_config
from megatron_dattn.conversion.families.mistral import language_rules
from megatron_dattn.conversion.families.model_rules import export_rules
from megatron_dattn.conversion.families.siglip import vision_rules
from megatron_dattn.conversion.families.weight_map import Rule
from megatron_dattn.models.config import LanguageConfig, VisionConfig
from megatron_dattn.runtime.distributed import one_process

SIGLIP = VisionConfig(feature_layer=-1)  # with the last layer, as the public files have it
MISTRAL = LanguageConfig()
SHARD_BYTES = 5_000_000_000
_BLOCK = 32 * 2**20
_BYTES_PER_VALUE = 2
_SPECIAL = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[control_8]")


@dataclass(frozen=True)
class RandomCheckpoint:
    """Folders of a vision encoder and of a language model."""

    vision: Path
    language: Path

    @property
    def files(self) -> list[Path]:
        """The shards of both."""
        return sorted([*self.vision.glob("*.safetensors"), *self.language.glob("*.safetensors")])

    @property
    def num_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)


def write_random_checkpoint(
    folder: Path,
    *,
    vision: VisionConfig = SIGLIP,
    language: LanguageConfig = MISTRAL,
    shard_bytes: int = SHARD_BYTES,
) -> RandomCheckpoint:
    """Write both folders, BF16.

    Args:
        shard_bytes: no shard is larger, unless a single tensor is.
    """
    made = RandomCheckpoint(folder / "siglip", folder / "mistral")
    for path, rules, config in (
        (made.vision, vision_rules(vision), siglip_json(vision)),
        (made.language, language_rules(language), mistral_json(language)),
    ):
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(config, indent=1))
        _write_shards(path, rules, shard_bytes)
    _write_tokenizer(made.language)
    size = {"height": vision.image_size, "width": vision.image_size}
    processor = {"image_processor_type": "SiglipImageProcessor", "size": size}
    (made.vision / "preprocessor_config.json").write_text(json.dumps(processor))
    return made


def add_adapter(imported: Path, target: Path) -> None:
    """A run folder as stage 1 leaves it: an import's weights and, constant, what stage 1 adds."""
    found = find_checkpoint(imported, verify=False)
    assert found is not None, imported
    model_config = load_config(imported / "config.yaml").model
    stored = open_tensors(found.path)
    shapes = {rule.megatron: rule.shape for rule in export_rules(model_config)}
    shards = parameter_shards(shapes, torch.bfloat16)

    def load(name: str) -> Tensor:
        if name in stored:
            return stored[name].load()
        return torch.full(shapes[name], 0.01, dtype=torch.bfloat16)

    facts = {**found.manifest.facts, "modules": sorted({n.partition(".")[0] for n in shapes})}
    with one_process():
        values = values_by_name(shards, load)
        save_checkpoint(target, 1, dict(shards), facts=facts, values=values)
    shutil.copyfile(imported / "config.yaml", target / "config.yaml")
    shutil.copytree(imported / "tokenizer", target / "tokenizer")


def _write_shards(folder: Path, rules: list[Rule], shard_bytes: int) -> None:
    shapes = {name: shape for rule in rules for name, shape in rule.sources.items()}
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        size = prod(shape) * _BYTES_PER_VALUE
        if shards[-1] and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += size
    index: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_safetensors(folder / file, tensors, seed=number)
        index |= dict.fromkeys(tensors, file)
    content = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def _write_safetensors(path: Path, shapes: dict[str, tuple[int, ...]], seed: int) -> None:
    """The format: the header's length, a JSON header, the tensors behind each other."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + prod(shape) * _BYTES_PER_VALUE
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for block in _random_bytes(end, seed):
            file.write(block)


def _random_bytes(count: int, seed: int) -> Iterator[bytes]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(_BLOCK // _BYTES_PER_VALUE, generator=generator).bfloat16()
    block = values.view(torch.uint8).numpy().tobytes()
    while count > 0:
        yield block[:count]
        count -= len(block)


def mistral_json(language: LanguageConfig) -> dict[str, object]:
    """A `config.json`, as transformers writes it."""
    return {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "hidden_size": language.hidden_size,
        "num_hidden_layers": language.num_hidden_layers,
        "num_attention_heads": language.num_attention_heads,
        "num_key_value_heads": language.num_key_value_heads,
        "head_dim": language.head_dim,
        "intermediate_size": language.intermediate_size,
        "vocab_size": language.vocab_size,
        "rope_theta": language.rope_theta,
        "rms_norm_eps": language.rms_norm_eps,
        "sliding_window": None,
        "tie_word_embeddings": language.tie_word_embeddings,
    }


def siglip_json(vision: VisionConfig) -> dict[str, object]:
    """A `config.json`, as transformers writes it."""
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": vision.hidden_size,
        "num_hidden_layers": vision.num_hidden_layers,
        "num_attention_heads": vision.num_attention_heads,
        "intermediate_size": vision.intermediate_size,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
    }


def _write_tokenizer(folder: Path) -> None:
    """The special tokens that matter, and no language."""
    vocabulary = {token: index for index, token in enumerate(_SPECIAL)}
    backend = Tokenizer(BPE(vocabulary, merges=[], unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=list(_SPECIAL[3:]),
    ).save_pretrained(folder)
