"""Hugging Face folders of an encoder and of a language model into one Megatron checkpoint.

Stage 1 starts from it. The result is a run folder like any other: `config.yaml` with the model
section, `tokenizer/`, and a committed checkpoint of step 0. It holds no adapter and nothing of what
the attention preset adds to the decoder layers: stage 1 trains those from their initial values. The
checkpoint is committed last, so an interrupted conversion leaves none.
"""

import dataclasses
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from megatron_dattn.checkpoint import save_checkpoint
from megatron_dattn.conversion import families
from megatron_dattn.conversion.safetensors_reader import SafetensorsFolder, read_json
from megatron_dattn.conversion.tokenizer import copy_tokenizer
from megatron_dattn.conversion.weight_map import Rule, check_tensors
from megatron_dattn.data.images import PROCESSOR_FILES
from megatron_dattn.data.tokenizer import load_tokenizer, tokenizer_sha256
from megatron_dattn.errors import CheckpointError
from megatron_dattn.models.added_parameters import is_added
from megatron_dattn.models.build import build_model
from megatron_dattn.models.config import ExecutionConfig, ModelConfig
from megatron_dattn.parallel.config import ParallelConfig
from megatron_dattn.runtime.distributed import (
    destroy_distributed,
    initialize_distributed,
    seed_everything,
)

logger = logging.getLogger(__name__)

STAGE = "import"


@dataclass(frozen=True)
class Source:
    """One Hugging Face folder whose tensors have been compared with its config."""

    module: str
    weights: SafetensorsFolder
    rules: list[Rule]


def import_checkpoint(
    vision: Path, language: Path, output: Path, *, attention: str = "dattn", dtype: str = "bf16"
) -> ModelConfig:
    """Convert and save. One process; the model is held in memory once.

    Args:
        vision: folder of an encoder that `families.py` knows: config.json, safetensors,
            preprocessor_config.json.
        language: folder of a language model: config.json, safetensors, tokenizer.json.
        output: the new run folder; it must not hold a checkpoint yet.
        attention: the preset that the configuration names (the weights do not depend on it).
        dtype: "bf16" or "fp32", of the stored weights.

    Returns:
        The model's configuration.

    Raises:
        CheckpointError: an input does not fit or is damaged, or the output cannot be written; no
            checkpoint exists then.
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
    try:
        _write_assets(vision, language, output, model)
        _write_weights(sources, output, model, dtype)
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)
        raise
    return model


def _check_output(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise CheckpointError(f"{output} is a file; convert into a new folder")
    if output.exists() and any(output.iterdir()):
        raise CheckpointError(f"{output} is not empty; convert into a new folder")


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
    return Source("vision_model", weights, rules)


def _language_source(folder: Path, config: dict[str, Any], model: ModelConfig) -> Source:
    family = families.language_family(config)
    weights = SafetensorsFolder(folder)
    rules = family.language_rules(model.language)
    check_tensors(rules, weights.shapes, unused=family.UNUSED_PREFIXES, origin=str(folder))
    return Source("language_model", weights, rules)


def _write_assets(vision: Path, language: Path, output: Path, model: ModelConfig) -> None:
    """Everything of the run folder but the checkpoint."""
    tokenizer = output / "tokenizer"
    image_id = copy_tokenizer(language, tokenizer)
    template = "mistral_v3" if model.language.family == "mistral" else "plain"
    load_tokenizer(str(tokenizer), template=template, vocab_size=model.language.vocab_size)
    processors = [vision / name for name in PROCESSOR_FILES if (vision / name).is_file()]
    if not processors:
        raise CheckpointError(
            f"{vision / PROCESSOR_FILES[0]} is missing: it says how images are prepared"
        )
    for processor in processors:
        shutil.copyfile(processor, tokenizer / processor.name)
    config = {
        "model": dataclasses.asdict(model),
        "data": {"tokenizer": str(tokenizer.resolve())},
    }
    (output / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    logger.info("token <image> has id %d", image_id)


def _write_weights(
    sources: list[Source], output: Path, model_config: ModelConfig, dtype: str
) -> None:
    initialize_distributed()
    try:
        seed_everything(0)
        execution = ExecutionConfig(
            precision="fp32" if dtype == "fp32" else "bf16", transformer_impl="local"
        )
        model = build_model(model_config, ParallelConfig(), execution)
        for source in sources:
            fill_module(model, source)
            logger.info("%s converted from %s", source.module, source.weights.folder)
        save_checkpoint(
            output,
            0,
            {"model": _sharded_modules(model, [source.module for source in sources])},
            facts=_facts(sources, model_config, output),
        )
    finally:
        destroy_distributed()


def fill_module(model: nn.Module, source: Source) -> None:
    """Copy Hugging Face tensors into a module's parameters, one parameter at a time.

    What a preset adds to the language model keeps its values.
    """
    module = model.get_submodule(source.module)
    parameters = {
        name: parameter
        for name, parameter in module.named_parameters()
        if not is_added(f"{source.module}.{name}")
    }
    for rule in source.rules:
        parameter = parameters.pop(rule.megatron)
        joined = rule.layout.join([source.weights.load(name) for name in rule.sources])
        with torch.no_grad():
            parameter.copy_(joined.reshape(parameter.shape))
    assert not parameters, f"no rule fills {sorted(parameters)}"


def _sharded_modules(model: nn.Module, modules: list[str]) -> dict[str, Any]:
    prefixes = tuple(f"{module}." for module in modules)
    sharded: dict[str, Any] = model.sharded_state_dict()  # type: ignore[operator]
    return {
        key: value
        for key, value in sharded.items()
        if key.startswith(prefixes) and not is_added(key)
    }


def _facts(sources: list[Source], model: ModelConfig, output: Path) -> dict[str, Any]:
    return {
        "model": dataclasses.asdict(model),
        "modules": [source.module for source in sources],
        "tokenizer": tokenizer_sha256(str(output / "tokenizer")),
        "stage": STAGE,
        "step": 0,
        "sources": {source.module: str(source.weights.folder) for source in sources},
    }
