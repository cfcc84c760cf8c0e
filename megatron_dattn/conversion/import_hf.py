"""Hugging Face folders of an encoder and of a language model into one Megatron checkpoint.

Stage 1 starts from it. The result is a run folder like any other: `config.yaml` with the model
section, `tokenizer/`, and a committed checkpoint of step 0. It holds no adapter and nothing of what
the attention preset adds to the decoder layers: stage 1 trains those from their initial values. The
checkpoint is committed last, so an interrupted conversion leaves none. Parameters are read,
converted and written one by one: memory does not grow with the number of layers.
"""

import dataclasses
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from megatron_dattn.checkpoint import save_checkpoint
from megatron_dattn.checkpoint.tensors import ParameterValues
from megatron_dattn.conversion.import_plan import ImportPlan, Source, plan_import, processor_files
from megatron_dattn.conversion.tokenizer import copy_tokenizer
from megatron_dattn.conversion.weight_map import Rule
from megatron_dattn.data.tokenizer import tokenizer_sha256
from megatron_dattn.models.config import ModelConfig
from megatron_dattn.runtime.distributed import one_process

logger = logging.getLogger(__name__)

STAGE = "import"


def import_checkpoint(
    vision: Path, language: Path, output: Path, *, attention: str = "dattn", dtype: str = "bf16"
) -> ModelConfig:
    """Convert and save, in one process.

    Args:
        vision: folder of an encoder that `families.py` knows: config.json, safetensors,
            preprocessor_config.json.
        language: folder of a language model: config.json, safetensors, tokenizer.json.
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
    plan = plan_import(vision, language, output, attention=attention, dtype=dtype)
    write_import(plan)
    return plan.model


def write_import(plan: ImportPlan, written: Callable[[int], object] | None = None) -> None:
    """Carry out a planned import.

    Args:
        written: is told the bytes of each parameter that has been converted.

    Raises:
        CheckpointError: the output cannot be written; it is removed then.
    """
    try:
        _write_assets(plan)
        _write_weights(plan, written or (lambda num_bytes: None))
    except BaseException:
        shutil.rmtree(plan.output, ignore_errors=True)
        raise


def _write_assets(plan: ImportPlan) -> None:
    """Everything of the run folder but the checkpoint."""
    tokenizer = plan.output / "tokenizer"
    image_id = copy_tokenizer(plan.language, tokenizer)
    for processor in processor_files(plan.vision):
        shutil.copyfile(processor, tokenizer / processor.name)
    config = {
        "model": dataclasses.asdict(plan.model),
        "data": {"tokenizer": str(tokenizer.resolve())},
    }
    (plan.output / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    logger.info("token <image> has id %d", image_id)


def _write_weights(plan: ImportPlan, written: Callable[[int], object]) -> None:
    rules = {f"{s.module}.{rule.megatron}": (s, rule) for s in plan.sources for rule in s.rules}
    # Held apart from the shards: saving gives those an axis of layers.
    targets = {name: shard.data for name, shard in plan.shards.items()}

    def load(name: str) -> Tensor:
        target = targets[name]
        assert target is not None
        value = _convert(*rules[name], target)
        written(value.nbytes)
        return value

    with one_process():
        save_checkpoint(
            plan.output,
            0,
            dict(plan.shards),
            facts=_facts(plan),
            values=ParameterValues(plan.shards, load),
        )


def _convert(source: Source, rule: Rule, target: Tensor) -> Tensor:
    """One parameter in the shape and dtype of `target`, read from its Hugging Face tensors."""
    whole = rule.layout.join([source.weights.load(name) for name in rule.sources])
    return whole.to(target.dtype).reshape(target.shape)


def _facts(plan: ImportPlan) -> dict[str, Any]:
    return {
        "model": dataclasses.asdict(plan.model),
        "modules": [source.module for source in plan.sources],
        "tokenizer": tokenizer_sha256(str(plan.output / "tokenizer")),
        "stage": STAGE,
        "step": 0,
        "sources": {source.module: str(source.weights.folder) for source in plan.sources},
    }
