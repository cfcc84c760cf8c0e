"""Bytes per rank while training, computed from the configuration alone.

Bytes of weights, gradients and optimizer state follow from the parameters (`parameters.py`), what
is kept between forward and backward pass from the layers (`activations.py`). Most is needed at one
of three moments: at the loss, in the backward pass of a layer, or in the update. Not counted: the
CUDA context, NCCL's buffers and the allocator's fragmentation (see `RESERVE_BYTES`).
"""

from dataclasses import dataclass

from megatron_dattn.models.config import ModelConfig
from megatron_dattn.models.execution import ExecutionConfig
from megatron_dattn.parallel.config import ParallelConfig
from megatron_dattn.planner import activations
from megatron_dattn.planner.activations import FP32, VALUE_BYTES, PackSize, Setup
from megatron_dattn.planner.parameters import count_parameters, rank_parameters

RESERVE_BYTES = 4 * 10**9
"""Room to leave for what is not counted: context, NCCL, fragmentation. A rule of thumb."""

# Per trained parameter. Gradients are accumulated in fp32; Adam keeps two fp32 moments, and BF16
# weights need an fp32 copy of themselves.
_GRADIENT_BYTES = 4
_OPTIMIZER_BYTES = {"bf16": 12, "fp32": 8}
_IN_WORDS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "buffers": "buffers",
    "update": "the update",
    "head": "logits",
    "at_work": "a layer's backward pass",
    "decoder": "the decoder's activations",
    "vision": "the encoder's activations",
}


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank, by what they hold."""

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    """Rotary tables, gathered tokens, workspaces."""
    decoder: int
    """Activations that the decoder layers keep for the backward pass."""
    vision: int
    """Pixels, and activations that the vision encoder and the adapter keep."""
    head: int
    """At the loss: logits and their gradient."""
    at_work: int
    """In the backward pass of a layer (and its recomputation), less what later layers kept."""
    update: int
    """In the update: a copy of a moment."""

    @property
    def states(self) -> int:
        """Bytes that are there all the time."""
        return self.weights + self.gradients + self.optimizer + self.buffers

    @property
    def moments(self) -> dict[str, int]:
        """Bytes besides the states at each moment that may need most."""
        kept = self.decoder + self.vision
        return {
            "at the loss": kept + self.head,
            "in a layer's backward pass": kept + self.at_work,
            "in the update": self.update,
        }

    @property
    def worst_moment(self) -> str:
        return max(self.moments, key=lambda moment: self.moments[moment])

    @property
    def total(self) -> int:
        """At the moment that needs most."""
        return self.states + max(self.moments.values())

    @property
    def terms(self) -> dict[str, int]:
        """Bytes at the moment that needs most, by what they hold."""
        terms = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "buffers": self.buffers,
        }
        match self.worst_moment:
            case "in the update":
                return terms | {"update": self.update}
            case "at the loss":
                terms["head"] = self.head
            case _:
                terms["at_work"] = self.at_work
        return terms | {"decoder": self.decoder, "vision": self.vision}

    @property
    def largest(self) -> str:
        """The largest of the terms, in words."""
        return _IN_WORDS[max(self.terms, key=lambda name: self.terms[name])]


def rank_memory(
    config: ModelConfig,
    parallel: ParallelConfig,
    execution: ExecutionConfig,
    pack: PackSize,
    *,
    data_parallel_size: int,
    num_microbatches: int,
    trained: frozenset[str],
    pipeline_stage: int = 0,
) -> RankMemory:
    """Bytes on a rank of a pipeline stage while it trains.

    Under pipeline parallelism (one forward, one backward) a rank keeps the activations of
    as many micro-batches as there are pipeline stages from its own to the last.
    """
    held = rank_parameters(config, parallel, execution, pipeline_stage)
    updated = {module: count for module, count in held.items() if module in trained}
    num_updated = sum(updated.values())
    sharded = data_parallel_size if parallel.use_distributed_optimizer else 1
    num_pipeline_stages = parallel.pipeline_model_parallel_size
    in_flight = min(num_pipeline_stages - pipeline_stage, num_microbatches)
    first, last = pipeline_stage == 0, pipeline_stage == num_pipeline_stages - 1
    setup = Setup(config, parallel, execution, pack, trained)
    first_layer, end = _layers(setup, pipeline_stage)
    layers = [activations.decoder_layer(setup, number) for number in range(first_layer, end)]
    tokens = setup.hidden(pack.visual_tokens + pack.text_tokens)
    return RankMemory(
        weights=sum(held.values()) * VALUE_BYTES[execution.precision],
        gradients=num_updated * _GRADIENT_BYTES,
        optimizer=num_updated * _OPTIMIZER_BYTES[execution.precision] // sharded,
        buffers=activations.buffers(setup),
        decoder=in_flight * (tokens + sum(layers)),  # what enters the first layer is kept, too
        vision=in_flight * activations.encoder(setup) if first else 0,
        head=activations.head(setup) if last else 0,
        at_work=max(
            activations.decoder_layer_at_work(setup, first_layer + place) - sum(layers[place + 1 :])
            for place in range(len(layers))
        ),
        # torch's Adam takes the root of the second moments of a module's parameters at a time;
        # Transformer Engine's takes no such copy.
        update=max(updated.values(), default=0) * FP32 // sharded,
    )


def checkpoint_bytes(
    config: ModelConfig, execution: ExecutionConfig, trained: frozenset[str]
) -> int:
    """Bytes that a checkpoint takes on a disk: all weights, and the optimizer's state of some."""
    counts = count_parameters(config)
    updated = sum(count for module, count in counts.items() if module in trained)
    weights = sum(counts.values()) * VALUE_BYTES[execution.precision]
    return weights + updated * _OPTIMIZER_BYTES[execution.precision]


def _layers(setup: Setup, pipeline_stage: int) -> tuple[int, int]:
    """First layer of a pipeline stage, counted from 0, and the one behind its last."""
    num_layers = setup.parallel.layers_per_pipeline_stage(setup.config.language.num_hidden_layers)
    first = sum(num_layers[:pipeline_stage])
    return first, first + num_layers[pipeline_stage]
