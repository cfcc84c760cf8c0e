"""Two ranks that were started differently never train: one error names rank and field."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_dattn.config.cli import parse_command_line
from megatron_dattn.errors import ConfigError
from megatron_dattn.runtime.same_facts import all_ranks_have_same
from megatron_dattn.training import start_facts as module
from megatron_dattn.training.start_facts import start_facts
from tests.functional.workspace import make_workspace
from tests.support.distributed import run_distributed

# What rank 1 is started with, and the field that the error must name.
DISAGREEMENTS: dict[str, list[str]] = {
    "optimizer.learning_rates.adapter": ["--optimizer.learning_rates.adapter", "0.5"],
    "optimizer.weight_decay": ["--weight-decay", "0.1"],
    "optimizer.clip_grad": ["--clip-grad", "9.0"],
    "optimizer.warmup_ratio": ["--warmup-ratio", "0.5"],
    "training.global_batch_size": ["--global-batch-size", "16"],
    "training.micro_batch_size": ["--micro-batch-size", "4"],
    "training.train_iters": ["--train-iters", "9"],
    "training.seed": ["--seed", "7"],
    "execution.precision": ["--precision", "bf16"],
    "execution.recompute": ["--recompute", "full"],
    "data.template": ["--template", "plain"],
    "data.image_fit": ["--image-fit", "pad"],
    "data.visual_budget": ["--visual-budget", "20"],
    "data.text_budget": ["--text-budget", "176"],
    "data.max_skipped_fraction": ["--max-skipped-fraction", "0.5"],
    "model.language.rope_theta": ["--model.language.rope_theta", "500000"],
    "model.attention": ["--model.attention", "s_attn"],
    "parallel.tensor_model_parallel_size": ["--tensor-model-parallel-size", "2"],
    "checkpoint.save": ["--checkpoint.save", "elsewhere"],
    "checkpoint.save_interval": ["--save-interval", "7"],
    "content of data.train.0": ["--data.train", "[{path: FOLDER/data/validation.jsonl}]"],
    "data.train.length": ["--data.train", "[]"],
    "content of data.tokenizer": ["--data.tokenizer", "nowhere"],
}


def _answer(flags: list[str], theirs: list[str], package: str | None = None) -> str | None:
    """What this rank is told when rank 1 is started with more flags, or another package."""
    is_odd = dist.get_rank() == 1
    facts = start_facts(parse_command_line([*flags, *(theirs if is_odd else [])]).config)
    if is_odd and package is not None:
        assert package in facts
        facts[package] = "0.0"
    try:
        all_ranks_have_same(facts)
    except ConfigError as error:
        return str(error)
    return None


def _answers(folder: str, flags: list[str]) -> dict[str, str | None]:
    logging.disable(logging.CRITICAL)
    said = {
        field: _answer(flags, [word.replace("FOLDER", folder) for word in theirs])
        for field, theirs in DISAGREEMENTS.items()
    }
    for package in ("version of torch", "version of megatron-core", "code of megatron_dattn"):
        said[package] = _answer(flags, [], package)
    said["nothing"] = _answer(flags, [])
    said["host path"] = _answer(flags, ["--tensorboard-dir", "/elsewhere"])
    return said


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """By rank; all comparisons in one world."""
    folder: Path = tmp_path_factory.mktemp("workspace")
    workspace = make_workspace(folder)
    return run_distributed(_answers, 2, str(folder), workspace.flags())


@pytest.mark.parametrize(
    "field",
    [
        *DISAGREEMENTS,
        "version of torch",
        "version of megatron-core",
        "code of megatron_dattn",
    ],
)
def test_one_error_names_rank_and_field(answers: list[dict[str, Any]], field: str) -> None:
    first, second = (said[field] for said in answers)
    assert first == second
    assert first is not None
    assert f"{field} is " in first
    assert "on rank 1 (host " in first
    assert "on rank 0 (host " in first
    assert len(first) < 600


@pytest.mark.parametrize("case", ["nothing", "host path"])
def test_what_may_differ_passes(answers: list[dict[str, Any]], case: str) -> None:
    assert [said[case] for said in answers] == [None, None]


def test_the_list_of_what_may_differ_is_short() -> None:
    assert len(module.MAY_DIFFER) < 8
