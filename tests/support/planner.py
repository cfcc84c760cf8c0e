"""A small model, its pack, and what the planner says of their memory."""

from megatron_dattn.models.config import ModelConfig
from megatron_dattn.models.execution import ExecutionConfig
from megatron_dattn.parallel.config import ParallelConfig
from megatron_dattn.planner.memory import PackSize, RankMemory, rank_memory
from tests.support.vlm import even_model_config

ALL = frozenset({"vision_model", "adapter", "language_model"})
TINY = even_model_config()
PACK = PackSize(visual_tokens=64, text_tokens=32, images=4)


def memory_of(
    config: ModelConfig = TINY,
    parallel: ParallelConfig | None = None,
    execution: ExecutionConfig | None = None,
    trained: frozenset[str] = ALL,
    data_parallel_size: int = 1,
    num_microbatches: int = 4,
    pipeline_stage: int = 0,
) -> RankMemory:
    return rank_memory(
        config,
        parallel or ParallelConfig(),
        execution or ExecutionConfig(),
        PACK,
        data_parallel_size=data_parallel_size,
        num_microbatches=num_microbatches,
        trained=trained,
        pipeline_stage=pipeline_stage,
    )
