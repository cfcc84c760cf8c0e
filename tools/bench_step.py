"""Time whole training steps side by side: the engine against plain PyTorch, D-Attn against S-Attn.

    python -m tools.bench_step --rounds 20 --threads 2 --output benchmarks/step_cpu.md

One process, the demo's model, the same batches and weights. Every round runs each variant once, in
alternating order; what counts is the median over rounds of the ratio within a round. The first
variant runs twice per round: its ratio to itself is the noise floor. Losses are compared before
anything is timed.
"""

import argparse
import contextlib
import dataclasses
import itertools
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from examples.quickstart.language_backbone import language_config
from examples.quickstart.vision_backbone import vision_config
from megatron_dattn.attention import ImageSpan, TokenLayout
from megatron_dattn.config.pretrain import PretrainConfig
from megatron_dattn.conversion import mistral, siglip
from megatron_dattn.conversion.weight_map import GroupedQKV
from megatron_dattn.data.config import DataConfig
from megatron_dattn.data.sample import PackedBatch
from megatron_dattn.models.config import ModelConfig
from megatron_dattn.parallel.config import ParallelConfig
from megatron_dattn.runtime.distributed import destroy_distributed
from megatron_dattn.runtime.log import setup_logging, silence_import_warnings
from megatron_dattn.training.config import (
    LoggingConfig,
    ModuleLearningRates,
    OptimizerSettings,
    TrainingConfig,
)
from megatron_dattn.training.metrics import Metrics
from megatron_dattn.training.optimizer import build_optimizer, build_scheduler
from megatron_dattn.training.run import Run
from megatron_dattn.training.setup import build_training_model, start
from megatron_dattn.training.state import TrainState
from megatron_dattn.training.step import train_step
from megatron_dattn.training.stream import BatchStream
from tools.plain_vlm import PlainVLM

VOCAB_SIZE = 448
TEXT_LENGTHS = (12, 44)
SUPERVISED_SHARE = 0.4
RATE = 1e-4
# Losses of a step are means of fp32 sums in another order.
LOSS_TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class _Vocabulary:
    """What language_config asks of a tokenizer."""

    bos_token_id: int = 1
    eos_token_id: int = 2

    def __len__(self) -> int:
        return VOCAB_SIZE


def demo_model(attention: str) -> ModelConfig:
    """The sizes of the demo's model."""
    return ModelConfig(
        vision=siglip.vision_config(vision_config(grid=2).to_dict()),
        language=mistral.language_config(language_config(_Vocabulary()).to_dict()),
        attention=attention,
    )


def make_batches(model: ModelConfig, count: int, samples: int) -> list[PackedBatch]:
    """Random packs of one-image samples; the image stands behind the first token."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(*TEXT_LENGTHS, (samples,), generator=generator) for _ in range(count)]
    text_budget = -(-int(max(lengths.sum() for lengths in drawn)) // 16) * 16
    batches = []
    for lengths in drawn:
        ids = torch.randint(16, VOCAB_SIZE, (text_budget,), generator=generator)
        labels = ids.roll(-1)
        unlabelled = torch.rand(text_budget, generator=generator) > SUPERVISED_SHARE
        ends = lengths.cumsum(0)
        labels[unlabelled] = -100
        labels[ends - 1] = -100
        labels[int(ends[-1]) :] = -100
        layout = TokenLayout(
            text_lengths=tuple(lengths.tolist()),
            images=tuple(ImageSpan(i, 1, model.vision.grid) for i in range(samples)),
            visual_budget=samples * model.vision.num_patches,
            text_budget=text_budget,
            prompt_lengths=(1,) * samples,  # labels are drawn anywhere behind it
        )
        side = model.vision.image_size
        pixels = torch.randn(samples, 3, side, side, generator=generator)
        batches.append(PackedBatch(layout, ids, labels, pixels, []))
    return batches


class EngineVariant:
    """The training engine's own step on fixed batches."""

    def __init__(self, attention: str, batches: list[PackedBatch], rounds: int) -> None:
        model, layout = demo_model(attention), batches[0].layout
        rates = ModuleLearningRates(vision_model=RATE, adapter=RATE, language_model=RATE)
        config = PretrainConfig(
            model=model,
            parallel=ParallelConfig(),
            data=DataConfig(visual_budget=layout.visual_budget, text_budget=layout.text_budget),
            optimizer=OptimizerSettings(learning_rates=rates, warmup_ratio=0.0),
            training=TrainingConfig(
                train_iters=1000 * rounds,
                micro_batch_size=layout.num_samples,
                global_batch_size=layout.num_samples,
                precision="fp32",
                transformer_impl="local",
            ),
        )
        start(config)
        chunks = build_training_model(config)
        optimizer = build_optimizer(
            config.optimizer, chunks, bf16=False, use_distributed_optimizer=False
        )
        scheduler = build_scheduler(config.optimizer, optimizer, config.training.train_iters)
        self.model = chunks[0].module
        self.run = Run(
            config=config,
            state=TrainState(chunks, optimizer, scheduler, None),
            stream=BatchStream(itertools.cycle(batches), torch.device("cpu")),
            num_microbatches=1,
            num_rows=layout.num_rows,
            metrics=Metrics(
                LoggingConfig(), train_iters=1, first_step=0, world_size=1, peak_flops=None
            ),
            checkpointer=None,
            validation=None,
            ledger=None,
        )

    def step(self) -> float:
        return train_step(self.run).loss


class PlainVariant:
    """A hand-written loop: zero_grad, forward, backward, clip, fused AdamW."""

    def __init__(self, engine: EngineVariant, batches: list[PackedBatch]) -> None:
        self.model = PlainVLM(engine.run.config.model)
        copy_weights(engine.model, self.model, engine.run.config.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, fused=True)
        self.batches = itertools.cycle([padded(batch) for batch in batches])

    def step(self) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model(*next(self.batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()


def padded(batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels, ids [B, T] and labels [B, T], padded to the longest text."""
    lengths = list(batch.layout.text_lengths)
    used = sum(lengths)
    ids = nn.utils.rnn.pad_sequence(list(batch.input_ids[:used].split(lengths)), True)
    labels = nn.utils.rnn.pad_sequence(list(batch.labels[:used].split(lengths)), True, -100)
    return batch.pixel_values, ids, labels


@torch.no_grad()
def copy_weights(engine: nn.Module, plain: PlainVLM, sizes: ModelConfig) -> None:
    """Give the plain model the engine's weights."""
    source = dict(engine.named_parameters())
    language = sizes.language
    qkv = GroupedQKV(language.num_attention_heads, language.num_key_value_heads, language.head_dim)
    pairs: dict[str, Tensor] = {
        "patches.weight": source["vision_model.patch_embedding.weight"],
        "patches.bias": source["vision_model.patch_embedding.bias"],
        "positions": source["vision_model.position_embedding"],
        "adapter.0.weight": source["adapter.norm.weight"],
        "rows": source["adapter.positions.rows"],
        "columns": source["adapter.positions.columns"],
        "embedding.weight": source["language_model.embedding.word_embeddings.weight"],
        "norm.weight": source["language_model.decoder.final_layernorm.weight"],
        "head.weight": source["language_model.output_layer.weight"],
    }
    for kind in ("weight", "bias"):
        pairs[f"adapter.1.{kind}"] = source[f"adapter.linear_fc1.{kind}"]
        pairs[f"adapter.3.{kind}"] = source[f"adapter.linear_fc2.{kind}"]
        for n in range(sizes.vision.num_used_layers):
            layer = f"vision_model.encoder.layers.{n}"
            for ours, theirs in _LAYER_NAMES.items():
                pairs[f"vision.{n}.{ours}.{kind}"] = source[f"{layer}.{theirs}.{kind}"]
    for n in range(language.num_hidden_layers):
        layer = f"language_model.decoder.layers.{n}"
        q, k, v = qkv.split(source[f"{layer}.self_attention.linear_qkv.weight"])
        pairs[f"layers.{n}.q.weight"] = q
        pairs[f"layers.{n}.kv.weight"] = torch.cat((k, v))
        for ours, theirs in _LAYER_NAMES.items():
            if ours != "qkv":
                name = {"up": "gate_up"}.get(ours, ours)
                pairs[f"layers.{n}.{name}.weight"] = source[f"{layer}.{theirs}.weight"]
    plain.load_state_dict(pairs)


_LAYER_NAMES = {
    "norm1": "input_layernorm",
    "norm2": "pre_mlp_layernorm",
    "qkv": "self_attention.linear_qkv",
    "out": "self_attention.linear_proj",
    "up": "mlp.linear_fc1",
    "down": "mlp.linear_fc2",
}


def compare_losses(engine: EngineVariant, plain: PlainVariant, steps: int = 3) -> list[float]:
    """Losses of the first steps; they must agree between engine and plain model."""
    losses = []
    for _ in range(steps):
        ours, theirs = engine.step(), plain.step()
        if abs(ours - theirs) > LOSS_TOLERANCE * abs(theirs):
            sys.exit(f"error: the engine's loss is {ours}, the plain model's {theirs}")
        losses.append(ours)
    return losses


def time_rounds(variants: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant in each round; the order is reversed every other round."""
    for step in variants.values():
        for _ in range(3):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds):
        order = list(variants) if number % 2 == 0 else list(reversed(variants))
        for name in order:
            started = time.perf_counter()
            variants[name]()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio_row(title: str, above: list[float], below: list[float]) -> str:
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return f"| {title} | {statistics.median(ratios):.2f} | {min(ratios):.2f} | {max(ratios):.2f} |"


def report(seconds: dict[str, list[float]], losses: list[float], arguments: list[str]) -> str:
    """The result as Markdown."""
    engine, again = seconds["engine dattn"], seconds["engine dattn again"]
    lines = [
        "# One training step of the demo's model",
        "",
        f"- machine: {_processor()}, {torch.get_num_threads()} threads, {platform.system()}",
        f"- versions: Python {platform.python_version()}, torch {torch.__version__}",
        f"- commit: {_commit()}",
        f"- command: `python -m tools.bench_step {' '.join(arguments)}`",
        f"- {len(engine)} rounds, one process, fp32; forward, backward, clipping, AdamW",
        "- losses of the first steps agree between engine and plain PyTorch: "
        + ", ".join(f"{loss:.6f}" for loss in losses),
        "",
        "| variant | median ms | min | max |",
        "|---|---:|---:|---:|",
    ]
    for name, values in seconds.items():
        ms = [1000 * value for value in values]
        lines.append(f"| {name} | {statistics.median(ms):.1f} | {min(ms):.1f} | {max(ms):.1f} |")
    lines += [
        "",
        "| ratio within a round | median | min | max |",
        "|---|---:|---:|---:|",
        ratio_row("engine / itself (noise floor)", again, engine),
        ratio_row("engine / plain PyTorch", engine, seconds["plain PyTorch"]),
        ratio_row("S-Attn / D-Attn", seconds["engine s_attn"], engine),
        "",
    ]
    return "\n".join(lines)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _commit() -> str:
    call = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(call, capture_output=True, text=True, check=False).stdout.strip()


@contextlib.contextmanager
def variants_of(
    arguments: argparse.Namespace,
) -> Iterator[tuple[dict[str, Callable[[], float]], list[float]]]:
    batches = make_batches(demo_model("dattn"), count=4, samples=arguments.samples)
    try:
        dattn = EngineVariant("dattn", batches, arguments.rounds)
        plain = PlainVariant(dattn, batches)
        losses = compare_losses(dattn, plain)
        destroy_distributed()
        s_attn = EngineVariant("s_attn", batches, arguments.rounds)
        steps = {
            "engine dattn": dattn.step,
            "plain PyTorch": plain.step,
            "engine s_attn": s_attn.step,
            "engine dattn again": dattn.step,
        }
        yield steps, losses
    finally:
        destroy_distributed()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--samples", type=int, default=64, help="samples per step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="Markdown file; printed in any case")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    setup_logging(stream=sys.stderr, level="WARNING")
    with variants_of(arguments) as (steps, losses):
        seconds = time_rounds(steps, arguments.rounds)
    text = report(seconds, losses, sys.argv[1:])
    print(text)
    if arguments.output:
        arguments.output.write_text(text)
    return 0


if __name__ == "__main__":
    silence_import_warnings()
    sys.exit(main())
