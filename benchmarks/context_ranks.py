"""What one rank of `bench_context.py` does: a model of tiny width over many visual tokens.

Started by torch.distributed.run, which gives every rank its number; rank 0 prints the figures.
"""

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.layer_memory import reset_resident_peak, resident_peak
from megatron_dattn.runtime.log import silence_import_warnings

silence_import_warnings()  # before megatron-core is imported

from benchmarks.step_variants import EngineVariant, pretrain_config  # noqa: E402
from megatron_dattn.attention.layout import ImageSpan, TokenLayout  # noqa: E402
from megatron_dattn.batch import PackedBatch  # noqa: E402
from megatron_dattn.models.build import build_model  # noqa: E402
from megatron_dattn.models.config import (  # noqa: E402
    AdapterConfig,
    LanguageConfig,
    ModelConfig,
    VisionConfig,
)
from megatron_dattn.models.execution import ExactSavings, ExecutionConfig  # noqa: E402
from megatron_dattn.parallel.config import ParallelConfig  # noqa: E402
from megatron_dattn.parallel.context.shares import take_share  # noqa: E402
from megatron_dattn.runtime.distributed import (  # noqa: E402
    destroy_distributed,
    initialize_distributed,
    seed_everything,
)
from megatron_dattn.training.run import join_ranks  # noqa: E402

GRID = 16
TOKENS_PER_IMAGE = GRID * GRID
_PIXELS_PER_PATCH = 2
_FFN_CHUNK = 8192


def tiny_model(layers: int, heads: int, key_heads: int, head_dim: int) -> ModelConfig:
    """Images of 16 x 16 patches; everything as narrow as it can be."""
    vision = VisionConfig(
        hidden_size=16,
        num_hidden_layers=2,  # the last one is never run
        num_attention_heads=1,
        intermediate_size=16,
        image_size=GRID * _PIXELS_PER_PATCH,
        patch_size=_PIXELS_PER_PATCH,
    )
    language = LanguageConfig(
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=head_dim,
        intermediate_size=32,
        vocab_size=128,
    )
    return ModelConfig(vision, AdapterConfig(max_grid=GRID), language)


def one_sample(visual_tokens: int, text_tokens: int) -> PackedBatch:
    """A sample whose images stand before its text."""
    num_images = visual_tokens // TOKENS_PER_IMAGE
    images = (ImageSpan(0, 0, (GRID, GRID)),) * num_images
    side = GRID * _PIXELS_PER_PATCH
    torch.manual_seed(0)
    ids = torch.randint(0, 128, (text_tokens,))
    return PackedBatch(
        layout=TokenLayout((text_tokens,), images, visual_tokens, text_tokens),
        input_ids=ids,
        labels=torch.cat((ids[1:], ids[:1])),
        pixel_values=torch.randint(0, 256, (num_images, 3, side, side), dtype=torch.uint8),
        sample_keys=["one"],
        pixel_scale=torch.tensor([[1 / 127.5] * 3, [1.0] * 3]),
    )


def measure_traffic(order: dict[str, Any]) -> dict[str, Any]:
    """Bytes that crossed the loopback device in one forward and backward pass, per number of visual
    tokens, over all ranks; what it carries when nobody sends is taken off."""
    ranks = order["ranks"]
    initialize_distributed(context_parallel_size=ranks)
    seed_everything(0)
    parallel = ParallelConfig(context_parallel_size=ranks)
    config = tiny_model(order["layers"], order["heads"], order["key_heads"], order["head_dim"])
    model = build_model(config, parallel, ExecutionConfig(precision="fp32"))
    found = {}
    for visual in order["visual"]:
        whole = one_sample(visual, order["text"]).normalised()
        batch = take_share(whole, dist.get_rank(), ranks)
        model(batch).sum().backward()  # makes the connections
        idle = _sent_while(lambda: None)
        busy = _sent_while(lambda batch=batch: model(batch).sum().backward())
        found[visual] = busy - idle
    return found


def measure_memory(order: dict[str, Any]) -> dict[str, Any]:
    """The largest resident set of each rank in its first step: forward, backward and update."""
    ranks = order["ranks"]
    batch = one_sample(order["visual"], order["text"])
    savings = ExactSavings(ffn_chunk_tokens=_FFN_CHUNK)
    execution = ExecutionConfig(precision="fp32", recompute="full", savings=savings)
    config = dataclasses.replace(
        pretrain_config(tiny_model(2, 2, 1, 16), batch, execution),
        parallel=ParallelConfig(context_parallel_size=ranks),
    )
    join_ranks(config)
    engine = EngineVariant(config, batch)
    before = reset_resident_peak()
    report = engine.step()
    assert not report.skipped
    peaks: list[Any] = [None] * ranks
    dist.all_gather_object(peaks, (before, resident_peak()))
    return {
        "before": [before for before, _ in peaks],
        "peak": [peak for _, peak in peaks],
        "loss": report.loss,
        "visual_tokens": report.visual_tokens,
    }


def _sent_while(work: Any) -> int:
    """Bytes on the loopback device meanwhile; collective."""
    dist.barrier()
    before = _loopback_bytes()
    dist.barrier()
    work()
    dist.barrier()
    return _loopback_bytes() - before


def _loopback_bytes() -> int:
    """Sent since the device came up, by all processes that see it."""
    found = re.search(r"^\s*lo:\s*(.*)$", Path("/proc/self/net/dev").read_text(), re.M)
    assert found is not None
    return int(found[1].split()[8])


def main(order: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    measure = {"traffic": measure_traffic, "memory": measure_memory}[order.pop("what")]
    try:
        figures = measure(order)
        if dist.get_rank() == 0:
            print(json.dumps(figures), flush=True)
    finally:
        destroy_distributed()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
