"""How the model is laid out over ranks. Names are Megatron's."""

import math
from dataclasses import dataclass

from megatron_dattn.errors import ConfigError


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the parallel axes; data parallelism takes what is left of the world."""

    tensor_model_parallel_size: int = 1
    """Ranks that share every layer's weights, by heads and by FFN neurons."""
    pipeline_model_parallel_size: int = 1
    """Ranks that share the layers, a pipeline stage of neighbouring layers each."""
    virtual_pipeline_model_parallel_size: int = 1
    """Groups of neighbouring layers of each pipeline rank. With more than one the ranks take turns
    along the layers (Megatron's interleaved schedule): smaller bubbles, more messages."""
    num_layers_in_first_pipeline_stage: int | None = None
    """Decoder layers of the first pipeline stage, which also has encoder and embedding; the other
    pipeline stages share the rest. None for an equal share."""
    num_layers_in_last_pipeline_stage: int | None = None
    """Those of the last pipeline stage, which also has the head."""
    context_parallel_size: int = 1
    """Ranks that share the images of a pack, whose text each of them has whole; what they send each
    other in a layer does not depend on the number of visual tokens."""
    sequence_parallel: bool = False
    """Shard norms and residuals along the tokens inside the tensor-parallel group."""
    use_distributed_optimizer: bool = False
    """Split the optimizer's state over the data-parallel ranks (ZeRO-1)."""
    overlap_grad_reduce: bool = False
    """Sum gradients over the data-parallel ranks while the backward pass goes on."""
    distributed_timeout_minutes: float = 10.0
    """After this long without an answer a collective fails instead of waiting on."""
    rendezvous_timeout_minutes: float = 10.0
    """How long the ranks wait for each other at the start."""

    def __post_init__(self) -> None:
        for name in ("distributed_timeout_minutes", "rendezvous_timeout_minutes"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"parallel.{name} must be positive, got {getattr(self, name)}")
        uneven_fields = ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
        pipeline = ("pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size")
        sizes = ("tensor_model_parallel_size", *pipeline, "context_parallel_size")
        for name in (*sizes, *uneven_fields):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"parallel.{name} must be at least 1, got {value}")
        uneven = [name for name in uneven_fields if getattr(self, name) is not None]
        if uneven and self.pipeline_model_parallel_size == 1:
            raise ConfigError(
                f"parallel.{uneven[0]} needs parallel.pipeline_model_parallel_size > 1; leave it "
                "out"
            )
        if self.virtual_pipeline_model_parallel_size > 1 and self.pipeline_model_parallel_size == 1:
            raise ConfigError(
                "parallel.virtual_pipeline_model_parallel_size "
                f"{self.virtual_pipeline_model_parallel_size} needs "
                "parallel.pipeline_model_parallel_size > 1; leave it out"
            )
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ConfigError(
                "parallel.sequence_parallel needs parallel.tensor_model_parallel_size > 1, whose "
                "ranks share the tokens; leave it out"
            )

    @property
    def model_parallel_size(self) -> int:
        """Ranks that compute a pack together."""
        sizes = self.tensor_model_parallel_size, self.pipeline_model_parallel_size
        return math.prod((*sizes, self.context_parallel_size))

    def layers_per_pipeline_stage(self, num_layers: int) -> tuple[int, ...]:
        """Decoder layers of every pipeline stage.

        Raises:
            ConfigError: naming the sizes, and a split that would work.
        """
        num_pipeline_stages = self.pipeline_model_parallel_size
        first, last = (
            self.num_layers_in_first_pipeline_stage,
            self.num_layers_in_last_pipeline_stage,
        )
        sharing = num_pipeline_stages - (first is not None) - (last is not None)
        left = num_layers - (first or 0) - (last or 0)
        share, rest = divmod(left, sharing) if sharing else (0, left)
        if rest or left < 0 or (sharing and share == 0):
            raise ConfigError(
                f"parallel.pipeline_model_parallel_size {num_pipeline_stages} does not divide the "
                f"language model's {num_layers} layers" + self._split_that_works(num_layers)
            )
        layers = [share] * num_pipeline_stages
        layers[0], layers[-1] = first or layers[0], last or layers[-1]
        self._check_chunks(layers)
        return tuple(layers)

    def _check_chunks(self, layers: list[int]) -> None:
        chunks = self.virtual_pipeline_model_parallel_size
        if any(here % chunks for here in layers):
            fit = [n for n in range(1, chunks) if not any(here % n for here in layers)]
            raise ConfigError(
                f"parallel.virtual_pipeline_model_parallel_size {chunks} does not divide the "
                f"{', '.join(map(str, layers))} layers of the pipeline stages; the nearest that "
                f"does is {fit[-1]}"
            )

    def _split_that_works(self, num_layers: int) -> str:
        """Of nearly equal pipeline stages, the first and the last taking less than the others."""
        num_pipeline_stages, uneven = self.pipeline_model_parallel_size, ""
        if self.num_layers_in_first_pipeline_stage is not None:
            uneven += f", of which the first has {self.num_layers_in_first_pipeline_stage}"
        if self.num_layers_in_last_pipeline_stage is not None:
            uneven += f", of which the last has {self.num_layers_in_last_pipeline_stage}"
        ends = num_layers - (num_pipeline_stages - 2) * -(-num_layers // num_pipeline_stages)
        if num_pipeline_stages > num_layers:
            return f"{uneven}; choose at most {num_layers}"
        if num_pipeline_stages < 2 or ends < 2:
            return uneven
        return (
            f"{uneven}; set parallel.num_layers_in_first_pipeline_stage {ends // 2} and "
            f"parallel.num_layers_in_last_pipeline_stage {ends - ends // 2}"
        )
