"""Run folders of tiny models with random weights everywhere, also where training starts at zero."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_dattn.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from megatron_dattn.conversion.hf_import.run import import_checkpoint
from megatron_dattn.models.added_parameters import is_added
from megatron_dattn.models.build import build_model
from megatron_dattn.models.execution import ExecutionConfig
from megatron_dattn.parallel.config import ParallelConfig
from megatron_dattn.runtime.distributed import (
    destroy_distributed,
    initialize_distributed,
    seed_everything,
)


def make_run_folder(base: Path, folder: Path, attention: str, **adapter: Any) -> None:
    """What a finished stage leaves: the imported weights, and a random adapter, positions, gates.

    Args:
        base: holds the Hugging Face folders `vision` and `language`.
        adapter: settings of the adapter that differ from an import's.
    """
    imported = folder.with_name(f"imported-{folder.name}")
    config = import_checkpoint(
        base / "vision", base / "language", imported, attention=attention, dtype="fp32"
    )
    config = replace(config, adapter=replace(config.adapter, **adapter))
    initialize_distributed()
    seed_everything(7)
    model = build_model(config, ParallelConfig(), ExecutionConfig(precision="fp32"))
    found = find_checkpoint(imported)
    loaded = load_checkpoint(
        found.path,
        {"model": model.sharded_state_dict()},
        modules=["vision_model", "language_model"],
        without=is_added,
    )
    model.load_state_dict(loaded["model"], strict=False)
    for name, parameter in model.named_parameters():
        if name.startswith("adapter.positions") or name.endswith(".gate"):
            torch.nn.init.normal_(parameter, std=0.5)
        elif name.endswith("cross_attention.linear_proj.weight"):
            torch.nn.init.normal_(parameter, std=0.1)
        elif (is_added(name) or name.startswith("adapter.")) and "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    shutil.copytree(imported / "tokenizer", folder / "tokenizer")
    settings = yaml.safe_load((imported / "config.yaml").read_text())
    settings["model"]["adapter"] |= adapter
    settings["data"]["template"] = "mistral_v3"  # of the tiny tokenizer, whatever the family
    settings["execution"] = {"precision": "fp32"}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    modules = ["vision_model", "adapter", "language_model"]
    imported_facts = found.manifest.facts
    facts = {
        "model": asdict(config),
        "modules": modules,
        "tokenizer": imported_facts["tokenizer"],
        "stage": "tiny",
        "step": 1,
        "data_sets": ["tiny.jsonl"],
        "parent": {name: imported_facts[name] for name in ("stage", "step", "sources")},
    }
    save_checkpoint(folder, 1, {"model": model.sharded_state_dict()}, facts=facts)
    destroy_distributed()
