"""A run folder's checkpoint as a Hugging Face folder.

Decomposed models travel with their code (megatron_dattn/hf); plain self-attention becomes a
`LlavaForConditionalGeneration` where its adapter is LLaVA's. Everything that can be wrong is found
before the first byte is written, and the folder gets its name last: an interrupted export leaves
none that looks whole.
"""

import json
import logging
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_dattn import hf
from megatron_dattn.checkpoint import steps_of
from megatron_dattn.checkpoint.tensors import StoredTensor, open_tensors
from megatron_dattn.conversion.families.exportable import (
    check_exportable,
    image_rows,
    is_llava,
)
from megatron_dattn.conversion.families.model_rules import LLAVA_NAMES, export_rules
from megatron_dattn.conversion.families.weight_map import Rule
from megatron_dattn.conversion.hf_export.config import (
    TokenIds,
    config_from_model,
    generation_config,
)
from megatron_dattn.conversion.hf_export.metrics import metrics_of_run, read_metrics
from megatron_dattn.conversion.hf_export.model_card import model_card
from megatron_dattn.conversion.hf_export.processor import write_processor
from megatron_dattn.conversion.hf_export.tokenizer import write_tokenizer
from megatron_dattn.conversion.io.hf_folder import some
from megatron_dattn.conversion.io.output_folder import check_output, check_room, new_folder
from megatron_dattn.conversion.io.safetensors_writer import PlannedTensors, write_shards
from megatron_dattn.conversion.io.tokenizer_files import chat_template, write_chat_template
from megatron_dattn.conversion.io.weight_values import check_finite
from megatron_dattn.data.conversation import IMAGE_TOKEN
from megatron_dattn.data.tokenizer import own_chat_template, padding_id, token_id
from megatron_dattn.errors import CheckpointError
from megatron_dattn.inference.load import (
    RunAssets,
    find_run,
    load_assets,
    read_config,
    run_and_step,
)
from megatron_dattn.models.config import ModelConfig
from megatron_dattn.runtime.progress import ByteProgress, unseen

logger = logging.getLogger(__name__)

DEFAULT_SHARD_BYTES = 5 * 10**9
_SMALL_FILES_BYTES = 64 * 2**20
_DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


@dataclass(frozen=True)
class ExportOptions:
    """What the checkpoint does not say."""

    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    license_name: str | None = None
    metrics: Path | None = None
    """JSON file of an evaluation, for the model card; the run folder's accuracy.json where None."""
    step: int | None = None
    """Whose checkpoint is exported; the newest sound one where None."""
    name: str | None = None
    """Title of the model card; the output folder's name where None."""


def export_checkpoint(
    run_folder: Path,
    output: Path,
    options: ExportOptions | None = None,
    progress: ByteProgress = unseen,
) -> None:
    """Export a checkpoint, whatever parallel layout it was saved under.

    Parameters are read, converted and written one by one: memory does not grow with their number.

    Args:
        run_folder: the run, or one of its checkpoints (`run/step-0000400`).
        output: the new folder.
        progress: of comparing the checkpoint with its manifest, and of converting it.

    Raises:
        CheckpointError: there is no checkpoint, the output exists, or the disk has no room.
        ConfigError: two steps are named, the model cannot be expressed, or the run folder's
            tokenizer does not fit.
        DataError: the file of metrics that was named is missing or damaged.
    """
    options = options or ExportOptions()
    output = check_output(output)
    named = None if options.metrics is None else read_metrics(options.metrics)
    run_folder, step = run_and_step(run_folder, options.step)
    check_exportable(read_config(run_folder).model)  # before gigabytes are read
    found, config = find_run(run_folder, step, progress)
    assets = load_assets(run_folder, config)
    rows = image_rows(config.model, token_id(assets.tokenizer, IMAGE_TOKEN))
    planned = plan_tensors(open_tensors(found.path), config.model, rows)
    num_bytes = sum(part.num_bytes for part in planned)
    check_room(output, num_bytes + _SMALL_FILES_BYTES, "export")
    is_newest = found.step == max(steps_of(run_folder), default=found.step)
    card = model_card(
        config.model,
        title=options.name or output.name,
        facts=found.manifest.facts,
        metrics=metrics_of_run(run_folder, is_newest=is_newest) if named is None else named,
        license_name=options.license_name,
    )
    with new_folder(output) as folder:
        (folder / "README.md").write_text(card, encoding="utf-8")
        _write_small_files(assets, planned[0].dtype, run_folder, folder)
        with progress("exporting", num_bytes) as written:
            write_shards(folder, planned, options.max_shard_bytes, written)
    logger.info("exported step %d to %s", found.step, output)


def plan_tensors(
    stored: dict[str, StoredTensor], config: ModelConfig, image_rows: int = 0
) -> list[PlannedTensors]:
    """Every parameter of a checkpoint, as the Hugging Face tensors that it is made of.

    Args:
        image_rows: as of `exportable.image_rows`.

    Raises:
        CheckpointError: the checkpoint's parameters are not those of the configured model.
    """
    rules = export_rules(config, image_rows)
    missing = [rule.megatron for rule in rules if rule.megatron not in stored]
    unknown = sorted(stored.keys() - {rule.megatron for rule in rules})
    misshapen = [
        f"{rule.megatron} {list(stored[rule.megatron].shape)}"
        for rule in rules
        if rule.megatron in stored and stored[rule.megatron].shape != _parameter_shape(rule)
    ]
    problems = {"missing": missing, "unknown": unknown, "of another shape": misshapen}
    if any(problems.values()):
        raise CheckpointError(
            "the checkpoint does not fit its config.yaml: "
            + "; ".join(f"{what} {some(names)}" for what, names in problems.items() if names)
        )
    planned = []
    for rule in rules:
        tensor = stored[rule.megatron]
        make = partial(_pieces, rule, tensor)
        planned.append(PlannedTensors(dict(rule.sources), tensor.dtype, make))
    return planned + (_unread_norm(config, planned[0].dtype) if is_llava(config) else [])


def _parameter_shape(rule: Rule) -> tuple[int, ...]:
    """Of the Megatron parameter, padding included."""
    parts = [torch.empty(shape, device="meta") for shape in rule.sources.values()]
    return tuple(rule.layout.join(parts).shape)


def _pieces(rule: Rule, tensor: StoredTensor) -> dict[str, Tensor]:
    whole = tensor.load()
    check_finite(whole, [(rule.megatron, whole)], "the checkpoint")
    pieces = rule.layout.split(whole)
    return {
        name: piece.reshape(shape)
        for (name, shape), piece in zip(rule.sources.items(), pieces, strict=True)
    }


def _unread_norm(config: ModelConfig, dtype: torch.dtype) -> list[PlannedTensors]:
    """Hugging Face's encoder has a last norm, behind the features that LLaVA takes."""
    name = LLAVA_NAMES.vision("post_layernorm")
    names = {f"{name}.{kind}" for kind in ("weight", "bias")}
    shape = (config.vision.hidden_size,)

    def make() -> dict[str, Tensor]:
        return {name: torch.full(shape, float("weight" in name), dtype=dtype) for name in names}

    return [PlannedTensors(dict.fromkeys(sorted(names), shape), dtype, make)]


def _write_small_files(
    assets: RunAssets, dtype: torch.dtype, run_folder: Path, target: Path
) -> None:
    """Everything but the weights and the card."""
    config, tokenizer = assets.config, assets.tokenizer
    llava = is_llava(config.model)
    tokens = TokenIds(
        image=token_id(tokenizer, IMAGE_TOKEN),
        bos=tokenizer.bos_token_id,
        eos=int(tokenizer.eos_token_id),
        pad=padding_id(tokenizer),
    )
    pad_token = str(tokenizer.convert_ids_to_tokens(tokens.pad))
    write_tokenizer(tokenizer, run_folder / "tokenizer", target, pad_token=pad_token)
    template = assets.conversations.template
    write_chat_template(target, chat_template(template, own_chat_template(tokenizer)))
    vision = config.model.vision if llava else None
    write_processor(assets.preprocessor, target, llava_vision=vision)
    if not llava:
        _copy_code(target)
    content = config_from_model(config.model, tokens=tokens, dtype=_DTYPE_NAMES[dtype])
    (target / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    stops = sorted(assets.stop_ids)
    generation_config(stops, tokens, config.model).save_pretrained(target)


def _copy_code(target: Path) -> None:
    for path in sorted(Path(hf.__file__).parent.glob("*_dattn.py")):
        shutil.copyfile(path, target / path.name)
