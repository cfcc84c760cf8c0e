"""An import that is loaded under any layout answers as the Hugging Face model that it came from."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_dattn.checkpoint import load_checkpoint
from megatron_dattn.conversion.hf_import.run import import_whole_model
from megatron_dattn.conversion.verify.parity import one_text
from megatron_dattn.inference.load import find_run
from megatron_dattn.models.build import build_model
from megatron_dattn.models.execution import ExecutionConfig
from megatron_dattn.models.vlm import DAttnVLM
from megatron_dattn.parallel.config import ParallelConfig
from tests.support.distributed import run_distributed
from tests.support.megatron import init_model_parallel
from tests.unit.conversion.hf_models import IMAGE_SIZE, PATCH_SIZE
from tests.unit.conversion.llava_models import IMAGE_ID, save_llava

LAYOUTS = {"one process": (1, 1), "TP2": (2, 1), "PP2": (1, 2), "TP2-PP2": (2, 2)}
MODELS = (("clip", "llama"), ("siglip", "mistral"), ("siglip", "qwen2"), ("clip", "qwen3"))
IDS = [1, 9, 20, 33, 8, 60, 41, 17]
NUM_PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2


def pixels() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator) * 2 - 1


@torch.inference_mode()
def logits_of(runs: list[str], tensor: int, pipeline: int) -> list[list[list[float]]] | None:
    """Of every text token behind and in front of an image; None but on the last stage."""
    init_model_parallel(tensor, pipeline)
    parallel = ParallelConfig(
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline
    )
    logits = [_logits(Path(run), parallel) for run in runs]
    if parallel_state.is_pipeline_last_stage():
        return [each.tolist() for each in logits]
    return None


def _logits(run: Path, parallel: ParallelConfig) -> Tensor:
    model = _loaded(run, parallel)
    batch = one_text(model.model_config, torch.tensor(IDS), pixels(), image_offsets=(1,))
    tokens = torch.arange(batch.layout.visual_budget, batch.layout.num_tokens)
    seen: list[Tensor] = []

    def keep(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        seen.append(output)
        return output.sum(), torch.tensor(1), {}

    def forward_step(batches: Any, model: DAttnVLM) -> Any:
        mine = batch if model.pre_process else batch.without_pixels()
        return model.forward_logits(mine, tokens), partial(keep)

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=None,
        model=[model],
        num_microbatches=1,
        seq_length=batch.layout.num_tokens,
        micro_batch_size=1,
        forward_only=True,
    )
    return seen[0] if seen else torch.empty(0)


def _loaded(run: Path, parallel: ParallelConfig) -> DAttnVLM:
    found, config = find_run(run)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    model = build_model(
        config.model,
        parallel,
        ExecutionConfig(precision="fp32"),
        pre_process=stage == 0,
        post_process=stage == parallel.pipeline_model_parallel_size - 1,
    )
    loaded = load_checkpoint(found.path, {"model": model.sharded_state_dict()})
    model.load_state_dict(loaded["model"])
    return model.eval()


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[Tensor]]:
    """Run folders of imports, and what transformers computes with their originals."""
    base = tmp_path_factory.mktemp("imports")
    ids = torch.tensor([IDS[0], *[IMAGE_ID] * NUM_PATCHES, *IDS[1:]])
    runs, expected = [], []
    for vision, language in MODELS:
        folder = base / f"{vision}-{language}"
        theirs = save_llava(folder, vision, language)
        run = base / f"run-{folder.name}"
        import_whole_model(folder, run, dtype="fp32")
        with torch.inference_mode():
            logits = theirs(input_ids=ids[None], pixel_values=pixels()).logits[0]
        runs.append(str(run))
        expected.append(logits[ids != IMAGE_ID])
    return runs, expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_those_of_transformers(
    imported: tuple[list[str], list[Tensor]], layout: str
) -> None:
    (runs, expected), (tensor, pipeline) = imported, LAYOUTS[layout]
    by_rank = run_distributed(logits_of, tensor * pipeline, runs, tensor, pipeline)
    answers = [answer for answer in by_rank if answer is not None]
    assert len(answers) == tensor, "every tensor-parallel rank of the last stage has all logits"
    for answer in answers:
        for ours, theirs in zip(answer, expected, strict=True):
            # fp32: the same products, summed in another order, by another implementation.
            torch.testing.assert_close(torch.tensor(ours), theirs, rtol=1e-4, atol=1e-4)
