"""The aggregate configuration of a pretraining run; all sections but training's stand beside what
they configure."""

from dataclasses import dataclass, field

from megatron_dattn.attention import get_preset
from megatron_dattn.config.training import (
    CheckpointConfig,
    LoggingConfig,
    OptimizerConfig,
    TrainingConfig,
)
from megatron_dattn.data.config import DataConfig
from megatron_dattn.errors import ConfigError
from megatron_dattn.models.config import ModelConfig
from megatron_dattn.models.execution import ExecutionConfig
from megatron_dattn.parallel.config import ParallelConfig

NO_ALPHA = "reads images by attention of its own, apart from the text's: there is no alpha_V"
"""Of a preset with merge "cascade"; the preset's name stands before it."""


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that `pretrain_vlm.py` needs to know."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        attention = self.model.attention
        if self.logging.alpha_interval and get_preset(attention).merge == "cascade":
            raise ConfigError(
                f"logging.alpha_interval {self.logging.alpha_interval}: model.attention "
                f"'{attention}' {NO_ALPHA}; set it to 0"
            )
        if self.logging.alpha_interval and self.parallel.context_parallel_size > 1:
            raise ConfigError(
                f"logging.alpha_interval {self.logging.alpha_interval}: under "
                f"parallel.context_parallel_size {self.parallel.context_parallel_size} no rank has "
                "all images, whose shares of attention it would report; set it to 0"
            )

    @property
    def tokens_per_rank(self) -> int:
        """Tokens of a pack on one context-parallel rank, padding included."""
        visual = self.data.visual_budget // self.parallel.context_parallel_size
        return visual + self.data.text_budget
