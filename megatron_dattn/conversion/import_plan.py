"""Everything that can be known about an import before its first byte is written.

`plan_import` reads the configurations, the tokenizer and the headers of the weights, builds the
model on the meta device, which has shapes but no memory, and compares it all. What it returns is
what the import will do; what it refuses leaves no trace.
"""

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_dattn.conversion import families
from megatron_dattn.conversion.safetensors_reader import SafetensorsFolder, read_json
from megatron_dattn.conversion.tokenizer import copy_tokenizer
from megatron_dattn.conversion.weight_map import Rule, check_tensors
from megatron_dattn.data.images import PROCESSOR_FILES
from megatron_dattn.data.tokenizer import load_tokenizer
from megatron_dattn.errors import CheckpointError, ConfigError
from megatron_dattn.models.added_parameters import is_added
from megatron_dattn.models.build import build_model
from megatron_dattn.models.config import ExecutionConfig, ModelConfig
from megatron_dattn.parallel.config import ParallelConfig
from megatron_dattn.runtime.distributed import one_process

_FLOATING = ("F64", "F32", "F16", "BF16")

Shards = Mapping[str, ShardedTensor | ShardedTensorFactory]


@dataclass(frozen=True)
class Source:
    """One Hugging Face folder whose tensors have been compared with its config."""

    module: str
    weights: SafetensorsFolder
    rules: list[Rule]


@dataclass(frozen=True)
class ImportPlan:
    """An import that has been found possible."""

    vision: Path
    language: Path
    output: Path
    model: ModelConfig
    dtype: str
    sources: list[Source]
    shards: Shards
    """The parameters to be written, by name, on the meta device."""

    @property
    def num_parameters(self) -> dict[str, int]:
        """Per module."""
        counts = {source.module: 0 for source in self.sources}
        for name, shard in self.shards.items():
            assert shard.data is not None
            counts[name.partition(".")[0]] += shard.data.numel()
        return counts

    @property
    def num_bytes(self) -> int:
        """Of all parameters in the dtype in which they are stored."""
        tensors = [shard.data for shard in self.shards.values()]
        return sum(
            tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None
        )

    def summary(self) -> str:
        """What will be written, for people."""
        lines = [f"{name}: {count:,} parameters" for name, count in self.num_parameters.items()]
        size = f"{self.num_bytes / 1e9:.2f} GB as {self.dtype}"
        lines.append(f"{self.output}: {len(self.shards)} tensors, {size}")
        return "\n".join(lines)


def plan_import(
    vision: Path, language: Path, output: Path, *, attention: str = "dattn", dtype: str = "bf16"
) -> ImportPlan:
    """Check the inputs, the output and the room for it; nothing is written.

    The arguments are those of `import_checkpoint`.

    Raises:
        CheckpointError: an input does not fit or is damaged, the output folder is not empty, or the
            disk is too small.
        ConfigError: sizes or a preset that do not fit each other.
    """
    _check_output(output)
    vision_json, language_json = (read_json(f / "config.json") for f in (vision, language))
    model = ModelConfig(
        vision=families.vision_family(vision_json).vision_config(vision_json),
        language=families.language_family(language_json).language_config(language_json),
        attention=attention,
    )
    sources = [
        _vision_source(vision, vision_json, model),
        _language_source(language, language_json, model),
    ]
    _check_tokenizer(language, model)
    processor_files(vision)
    shards = _shards(model, sources, dtype)
    plan = ImportPlan(vision, language, output, model, dtype, sources, shards)
    _check_space(plan)
    return plan


def processor_files(vision: Path) -> list[Path]:
    """The image processor's files of a vision folder; CheckpointError if there are none."""
    found = [vision / name for name in PROCESSOR_FILES if (vision / name).is_file()]
    if not found:
        raise CheckpointError(
            f"{vision / PROCESSOR_FILES[0]} is missing: it says how images are prepared"
        )
    return found


def _check_output(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise CheckpointError(f"{output} is a file; convert into a new folder")
    if output.exists() and any(output.iterdir()):
        raise CheckpointError(
            f"{output} is not empty; convert into a new folder, or delete this one if it was left "
            "by a conversion that was interrupted"
        )


def _vision_source(folder: Path, config: dict[str, Any], model: ModelConfig) -> Source:
    family = families.vision_family(config)
    is_dual_encoder = "vision_config" in config
    weights = SafetensorsFolder(folder, prefix="vision_model." if is_dual_encoder else "")
    if not is_dual_encoder and any(name.startswith("vision_model.") for name in weights.shapes):
        # transformers 4 kept the prefix in files of the vision encoder alone.
        weights = SafetensorsFolder(folder, prefix="vision_model.")
    rules = family.vision_rules(model.vision)
    unused = family.unused_prefixes(model.vision, model.vision.num_hidden_layers)
    check_tensors(rules, weights.shapes, unused=unused, origin=str(folder))
    return _floating(Source("vision_model", weights, rules))


def _language_source(folder: Path, config: dict[str, Any], model: ModelConfig) -> Source:
    family = families.language_family(config)
    weights = SafetensorsFolder(folder)
    rules = family.language_rules(model.language)
    check_tensors(rules, weights.shapes, unused=family.UNUSED_PREFIXES, origin=str(folder))
    return _floating(Source("language_model", weights, rules))


def _floating(source: Source) -> Source:
    dtypes = source.weights.dtypes
    for name in (name for rule in source.rules for name in rule.sources):
        if dtypes[name] not in _FLOATING:
            raise CheckpointError(
                f"{source.weights.folder} holds {name} as {dtypes[name]}: quantized weights cannot "
                "be trained; convert the model in BF16 or FP32"
            )
    return source


def _check_tokenizer(language: Path, model: ModelConfig) -> None:
    """Try on a copy whether the tokenizer can be used with this model."""
    with tempfile.TemporaryDirectory() as trial:
        copy_tokenizer(language, Path(trial))
        # The one template that needs control tokens of its own.
        template = "mistral_v3" if model.language.family == "mistral" else "plain"
        try:
            load_tokenizer(trial, template=template, vocab_size=model.language.vocab_size)
        except ConfigError as error:
            raise CheckpointError(str(error).replace(trial, str(language))) from error


def _shards(model_config: ModelConfig, sources: list[Source], dtype: str) -> Shards:
    execution = ExecutionConfig(
        precision="fp32" if dtype == "fp32" else "bf16", transformer_impl="local"
    )
    with one_process():
        model = build_model(model_config, ParallelConfig(), execution, device="meta")
        sharded: dict[str, Any] = model.sharded_state_dict()
    modules = tuple(f"{source.module}." for source in sources)
    shards = {
        name: shard
        for name, shard in sharded.items()
        if isinstance(shard, ShardedTensor | ShardedTensorFactory)
        and name.startswith(modules)
        and not is_added(name)
    }
    filled = {f"{s.module}.{rule.megatron}" for s in sources for rule in s.rules}
    assert shards.keys() == filled, f"no rule or no place for {sorted(shards.keys() ^ filled)}"
    return shards


def _check_space(plan: ImportPlan) -> None:
    place = plan.output.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < plan.num_bytes:
        raise CheckpointError(
            f"disk full: the checkpoint needs {plan.num_bytes / 2**30:.2f} GiB, {place} has "
            f"{free / 2**30:.2f} GiB; make room or choose another folder"
        )
