"""How the model is laid out over ranks. Names are Megatron's."""

from dataclasses import dataclass

from megatron_dattn.errors import ConfigError


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the parallel axes; data parallelism takes what is left of the world."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    sequence_parallel: bool = False
    """Shard norms and residuals along the rows inside the tensor-parallel group."""
    use_distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    distributed_timeout_minutes: float = 10.0
    """After this long without an answer a collective fails instead of waiting on."""

    def __post_init__(self) -> None:
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"parallel.{name} must be at least 1, got {getattr(self, name)}")
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ConfigError(
                "parallel.sequence_parallel needs parallel.tensor_model_parallel_size > 1"
            )

    @property
    def model_parallel_size(self) -> int:
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size

    def check_model(self, *, num_heads: int, num_key_value_heads: int, num_layers: int) -> None:
        """Refuse sizes that the language model cannot be cut into.

        Raises:
            ConfigError: naming the flag, both numbers and the sizes that would work.
        """
        tp, pp = self.tensor_model_parallel_size, self.pipeline_model_parallel_size
        for name, count in (
            ("num_attention_heads", num_heads),
            ("num_key_value_heads", num_key_value_heads),
        ):
            if count % tp:
                raise ConfigError(
                    f"parallel.tensor_model_parallel_size {tp} does not divide "
                    f"language.{name} {count}"
                )
        if num_layers % pp:
            raise ConfigError(
                f"parallel.pipeline_model_parallel_size {pp} does not divide the language "
                f"model's {num_layers} layers"
            )
