"""Everything that can be known about an import before its first byte is written.

The source's configurations and headers are read (`source.py`, `vlm_source.py`), tokenizer and
image processor are tried, and the model is built on the meta device, where it has shapes but no
memory. What comes back is what the import will do; what is refused leaves no trace.
"""

import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_dattn.conversion.hf_import.chat_template import TemplateChoice, choose_template
from megatron_dattn.conversion.hf_import.source import ImportSource, two_model_source
from megatron_dattn.conversion.hf_import.tokenizer import check_special_tokens, copy_tokenizer
from megatron_dattn.conversion.hf_import.vlm_source import vlm_source
from megatron_dattn.conversion.io.output_folder import check_output, check_room
from megatron_dattn.data.image_settings import PROCESSOR_FILES, read_image_settings
from megatron_dattn.data.tokenizer import generation_ends, load_tokenizer
from megatron_dattn.errors import CheckpointError, ConfigError
from megatron_dattn.models.added_parameters import comes_with_preset
from megatron_dattn.models.build import build_model
from megatron_dattn.models.config import ModelConfig
from megatron_dattn.models.execution import ExecutionConfig
from megatron_dattn.parallel.config import ParallelConfig
from megatron_dattn.runtime.distributed import one_process

Shards = Mapping[str, ShardedTensor | ShardedTensorFactory]


@dataclass(frozen=True)
class ImportPlan:
    """An import that has been found possible."""

    source: ImportSource
    output: Path
    """Absolute."""
    dtype: str
    choice: TemplateChoice
    """In which the run folder's model is asked, unless the user says otherwise."""
    shards: Shards
    """The parameters to be written, by name, on the meta device."""
    initial: tuple[str, ...]
    """Parameters of the source's modules that it does not hold: they keep their initial values."""

    @property
    def template(self) -> str:
        """Its name."""
        return self.choice.name

    @property
    def num_parameters(self) -> dict[str, int]:
        """Per module."""
        counts = {module.name: 0 for module in self.source.modules}
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

    @property
    def num_rounded(self) -> dict[str, int]:
        """Number of the source's tensors that lose digits, by their dtype in safetensors' words."""
        counts: Counter[str] = Counter()
        for module in self.source.modules:
            for rule in module.rules:
                stored = self.shards[f"{module.name}.{rule.megatron}"].data
                assert stored is not None
                for name in rule.sources:
                    theirs = module.weights.dtype(name)
                    if torch.finfo(stored.dtype).eps > torch.finfo(theirs).eps:
                        counts[module.weights.dtypes[name]] += 1
        return dict(counts)

    def summary(self) -> str:
        """Describe for people what will be written."""
        lines = [f"{name}: {count:,} parameters" for name, count in self.num_parameters.items()]
        if self.initial:
            lines.append(f"not there, keep their initial values: {', '.join(self.initial)}")
        if self.num_rounded:
            counts = ", ".join(f"{count} of {dtype}" for dtype, count in self.num_rounded.items())
            remedy = "; --dtype fp32 keeps all their digits" if self.dtype == "bf16" else ""
            lines.append(f"tensors that are rounded to {self.dtype}: {counts}{remedy}")
        lines.append(f"conversations are written as {self.choice.name}: {self.choice.reason}")
        size = f"{self.num_bytes / 1e9:.2f} GB as {self.dtype}"
        lines.append(f"{self.output}: {len(self.shards)} tensors, {size}")
        lines.append(
            f"generates and trains in {self.dtype} unless told another execution.precision"
        )
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
    output = check_output(output)
    return _plan(two_model_source(vision, language, attention), output, dtype)


def plan_whole_import(
    folder: Path, output: Path, *, attention: str | None = None, dtype: str = "bf16"
) -> ImportPlan:
    """The same for one folder; the arguments are those of `import_whole_model`."""
    output = check_output(output)
    return _plan(vlm_source(folder, attention), output, dtype)


def _plan(source: ImportSource, output: Path, dtype: str) -> ImportPlan:
    template = _check_tokenizer(source)
    processor_files(source.image_processor)
    read_image_settings(source.image_processor, source.model.vision.image_size)
    shards, initial = _shards(source, dtype)
    plan = ImportPlan(source, output, dtype, template, shards, initial)
    check_room(output, plan.num_bytes, "checkpoint")
    return plan


def processor_files(folder: Path) -> list[Path]:
    """The image processor's files in a folder; CheckpointError if there are none."""
    found = [folder / name for name in PROCESSOR_FILES if (folder / name).is_file()]
    if not found:
        raise CheckpointError(
            f"{folder / PROCESSOR_FILES[0]} is missing: it says how images are prepared"
        )
    return found


def _check_tokenizer(source: ImportSource) -> TemplateChoice:
    """Try on a copy whether the tokenizer can be used with this model, and with which template."""
    language = source.model.language
    with tempfile.TemporaryDirectory() as trial:
        try:
            image_id = copy_tokenizer(source.tokenizer, Path(trial), vocab_size=language.vocab_size)
            tokenizer = load_tokenizer(trial, template="plain", vocab_size=language.vocab_size)
            generation_ends(trial, tokenizer)  # raises if it cannot be read
        except (CheckpointError, ConfigError) as error:
            raise CheckpointError(str(error).replace(trial, str(source.tokenizer))) from error
    if source.image_token_id not in (None, image_id):
        raise CheckpointError(
            f"{source.tokenizer}: config.json says that <image> has id {source.image_token_id}, in "
            f"the tokenizer it is {image_id}; they belong to different models"
        )
    check_special_tokens(source.special_tokens, tokenizer, source.tokenizer)
    return choose_template(source.tokenizer, tokenizer, language.family)


def _shards(source: ImportSource, dtype: str) -> tuple[Shards, tuple[str, ...]]:
    """What will be written, and which parameters of the source's modules will not."""
    sharded = _parameters(source.model, dtype)
    modules = tuple(f"{module.name}." for module in source.modules)
    shards = {name: shard for name, shard in sharded.items() if name.startswith(modules)}
    initial = {name for name in shards if comes_with_preset(name) and not source.has_added}
    shards = {name: shard for name, shard in shards.items() if name not in initial}
    filled = {f"{m.name}.{rule.megatron}" for m in source.modules for rule in m.rules}
    assert shards.keys() == filled, f"no rule or no place for {sorted(shards.keys() ^ filled)}"
    return shards, tuple(sorted(initial))


def _parameters(model_config: ModelConfig, dtype: str) -> Shards:
    execution = ExecutionConfig(
        precision="fp32" if dtype == "fp32" else "bf16", transformer_impl="local"
    )
    with one_process():
        model = build_model(model_config, ParallelConfig(), execution, device="meta")
        sharded: dict[str, Any] = model.sharded_state_dict()
    kinds = ShardedTensor | ShardedTensorFactory
    return {name: shard for name, shard in sharded.items() if isinstance(shard, kinds)}
