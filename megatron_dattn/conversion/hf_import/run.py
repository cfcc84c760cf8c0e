"""Hugging Face folders into one Megatron checkpoint: encoder and language model, or a whole VLM.

A stage starts from it. The result is a run folder like any other: `config.yaml` with model, data
and precision, `tokenizer/`, and a committed checkpoint of step 0. Made of two folders it holds no
adapter, and unless it was an export of ours, nothing of what the attention preset adds: training
begins with initial values there. The folder gets its name last, so an interrupted conversion leaves
none. Parameters are read, converted and written one by one: memory does not grow with the
number of layers.
"""

import dataclasses
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from megatron_dattn.checkpoint import save_checkpoint
from megatron_dattn.checkpoint.share import parameter_shards, values_by_name
from megatron_dattn.conversion.families.weight_map import Rule
from megatron_dattn.conversion.hf_import.plan import (
    DTYPES,
    ImportPlan,
    plan_import,
    plan_whole_import,
    processor_files,
)
from megatron_dattn.conversion.hf_import.source import ModuleWeights, language_folder
from megatron_dattn.conversion.hf_import.tokenizer import begin_token, copy_tokenizer
from megatron_dattn.conversion.io.output_folder import new_folder
from megatron_dattn.conversion.io.weight_values import ZeroTensors, check_finite
from megatron_dattn.data.tokenizer import tokenizer_sha256
from megatron_dattn.errors import CheckpointError, DiskFullError
from megatron_dattn.models.config import ModelConfig
from megatron_dattn.runtime.distributed import world_of_one
from megatron_dattn.yaml_files import CONFIG_DIR

logger = logging.getLogger(__name__)

STAGE = "import"


def import_checkpoint(
    vision: Path, language: Path, output: Path, *, attention: str = "dattn", dtype: str = "bf16"
) -> ModelConfig:
    """Convert and save, in one process.

    Args:
        vision: folder of an encoder that `families/` knows: config.json, safetensors,
            preprocessor_config.json.
        language: folder of a language model: config.json, safetensors, tokenizer.json; or a GGUF
            file.
        output: the new run folder; it must not hold anything yet.
        attention: the preset that the configuration names (the weights do not depend on it).
        dtype: "bf16" or "fp32", of the stored weights.

    Returns:
        The model's configuration.

    Raises:
        CheckpointError: an input does not fit or is damaged, or the output cannot be written; no
            checkpoint exists then.
        ConfigError: sizes or a preset that do not fit each other.
    """
    with language_folder(language) as folder:
        plan = plan_import(
            vision, folder, output, attention=attention, dtype=dtype, origin=language
        )
        write_import(plan)
    return plan.source.model


def import_whole_model(
    folder: Path, output: Path, *, attention: str | None = None, dtype: str = "bf16"
) -> ModelConfig:
    """Convert and save a whole vision-language model, in one process.

    Args:
        folder: of a LLaVA-1.5-format model or of an export of ours, with tokenizer and image
            processor.
        attention: the preset. None is the model's own: `s_attn` for LLaVA, whose weights another
            preset may start from; the preset of an export cannot be changed.
        output, dtype: as for `import_checkpoint`.

    Returns:
        The model's configuration.

    Raises:
        CheckpointError, ConfigError: as for `import_checkpoint`.
    """
    plan = plan_whole_import(folder, output, attention=attention, dtype=dtype)
    write_import(plan)
    return plan.source.model


def write_import(plan: ImportPlan, written: Callable[[int], object] | None = None) -> None:
    """Carry out a planned import.

    Args:
        written: is told the bytes of each parameter that has been converted.

    Raises:
        CheckpointError: the output cannot be written, or is no longer free; nothing is left then.
        ConfigError: a launcher has started several processes.
    """
    with world_of_one(), new_folder(plan.output) as folder:
        _write_assets(plan, folder)
        _write_weights(plan, folder, written or (lambda num_bytes: None))
    logger.info("imported to %s", plan.output)


def _write_assets(plan: ImportPlan, folder: Path) -> None:
    """Everything of the run folder but the checkpoint."""
    source, tokenizer = plan.source, folder / "tokenizer"
    copy_tokenizer(source.tokenizer, tokenizer, begin=begin_token(source.special_tokens))
    for processor in processor_files(source.image_processor):
        shutil.copyfile(processor, tokenizer / processor.name)
    data = {"tokenizer": f"{CONFIG_DIR}/{tokenizer.name}", "template": plan.template, **source.data}
    config = {
        "model": dataclasses.asdict(source.model),
        "data": data,
        # Without it FP32 weights would be computed with in BF16, the default.
        "execution": {"precision": plan.dtype},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    logger.info(
        "token <image> has id %d; conversations are written as %s",
        *(plan.image_token_id, plan.template),
    )


def _write_weights(plan: ImportPlan, folder: Path, written: Callable[[int], object]) -> None:
    rules = {
        f"{m.name}.{rule.megatron}": (m, rule) for m in plan.source.modules for rule in m.rules
    }
    zeros = {module.name: ZeroTensors() for module in plan.source.modules}
    dtype = DTYPES[plan.dtype]
    shards = parameter_shards(plan.shapes, dtype)

    def load(name: str) -> Tensor:
        value = _convert(*rules[name], dtype, zeros)
        written(value.nbytes)
        return value

    try:
        save_checkpoint(
            folder,
            0,
            dict(shards),
            facts=_facts(plan, folder),
            values=values_by_name(shards, load),
            quiet=True,  # the folder's name is a temporary one
        )
    except DiskFullError as error:
        raise CheckpointError(
            f"{plan.output} cannot be written: {error.__cause__}; it needs "
            f"{plan.num_bytes / 1e9:.3g} GB: make room or choose another folder"
        ) from error
    for module in plan.source.modules:
        zeros[module.name].warn(str(module.weights.folder))


def _convert(
    module: ModuleWeights, rule: Rule, dtype: torch.dtype, zeros: Mapping[str, ZeroTensors]
) -> Tensor:
    """One parameter in this dtype, read from its Hugging Face tensors.

    Args:
        zeros: where tensors of zeros are noted, by module.

    Raises:
        CheckpointError: a value is NaN or infinite, or becomes so in that dtype.
    """
    parts = {name: module.weights.load(name) for name in rule.sources}
    # Learnable positions start at zero, and those behind an image's grid stay so.
    if not rule.megatron.startswith("positions."):
        for name, part in parts.items():
            zeros[module.name].add(name, part)
    whole = rule.layout.join(list(parts.values())).to(dtype)
    check_finite(whole, parts.items(), str(module.weights.folder))
    return whole


def _facts(plan: ImportPlan, folder: Path) -> dict[str, Any]:
    return {
        "model": dataclasses.asdict(plan.source.model),
        "modules": [module.name for module in plan.source.modules],
        "has_added": plan.source.has_added,
        "tokenizer": tokenizer_sha256(str(folder / "tokenizer")),
        "stage": STAGE,
        "step": 0,
        "sources": {name: str(folder.resolve()) for name, folder in plan.source.folders.items()},
    }
