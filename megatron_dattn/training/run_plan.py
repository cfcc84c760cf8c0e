"""What follows from a configuration before anything is built: sizes checked, a full pack laid out.

A plan stands for the run in the dry run's sums; a configuration without one could not start, here
or elsewhere. What depends on this machine is checked in `checks.py`.
"""

import math
from dataclasses import dataclass

from megatron_dattn.attention.layout import ImageSpan, TokenLayout
from megatron_dattn.config.pretrain import PretrainConfig
from megatron_dattn.config.training import nearest_multiples
from megatron_dattn.data.images import ImagePreprocessor
from megatron_dattn.errors import ConfigError
from megatron_dattn.models.build import check_model_sizes
from megatron_dattn.parallel.context.shares import share_of
from megatron_dattn.planner.memory import PackSize, RankMemory, rank_memory
from megatron_dattn.runtime.distributed import check_parallel_sizes
from megatron_dattn.training.stages import trained_modules


@dataclass(frozen=True)
class Plan:
    """A checked configuration and what follows from it at once."""

    config: PretrainConfig
    world_size: int
    data_parallel_size: int
    num_microbatches: int
    layout: TokenLayout
    """A full pack: as many one-image samples as fit, the text tokens shared out among them."""
    trained: frozenset[str]

    @property
    def layout_on_a_rank(self) -> TokenLayout:
        """The full pack on the first context-parallel rank, which has as many images as any."""
        return share_of(self.layout, 0, self.config.parallel.context_parallel_size).layout

    @property
    def num_replicas_of_weights(self) -> int:
        """Context-parallel ranks hold the same weights as data-parallel ones."""
        return self.data_parallel_size * self.config.parallel.context_parallel_size

    @property
    def pack(self) -> PackSize:
        """A rank's share of a full pack."""
        layout = self.layout_on_a_rank
        return PackSize(layout.visual_budget, layout.text_budget, len(layout.images))


def stage_memory(plan: Plan, pipeline_stage: int) -> RankMemory:
    """Bytes on a rank of a pipeline stage, under full packs."""
    return rank_memory(
        plan.config.model,
        plan.config.parallel,
        plan.config.execution,
        plan.pack,
        data_parallel_size=plan.num_replicas_of_weights,
        num_microbatches=plan.num_microbatches,
        trained=plan.trained,
        pipeline_stage=pipeline_stage,
    )


def make_plan(config: PretrainConfig, world_size: int) -> Plan:
    """Check the configuration.

    Raises:
        ConfigError: settings that do not fit each other.
    """
    parallel = config.parallel
    data_parallel = check_parallel_sizes(
        world_size,
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    check_model_sizes(config.model, parallel, config.execution)
    num_microbatches = config.training.num_microbatches(data_parallel)
    check_interleaving(config, num_microbatches, data_parallel)
    check_budgets(config)
    check_fp8_sizes(config)
    check_validation(config)
    return Plan(
        config=config,
        world_size=world_size,
        data_parallel_size=data_parallel,
        num_microbatches=num_microbatches,
        layout=_full_pack(config),
        trained=frozenset(trained_modules(config.optimizer.learning_rates)),
    )


def check_interleaving(
    config: PretrainConfig, num_microbatches: int, data_parallel_size: int
) -> None:
    """Interleaved pipeline stages pass micro-batches on in groups of as many as there are."""
    parallel, training = config.parallel, config.training
    stages = parallel.pipeline_model_parallel_size
    if parallel.virtual_pipeline_model_parallel_size > 1 and num_microbatches % stages:
        samples = training.micro_batch_size * data_parallel_size * stages
        raise ConfigError(
            f"parallel.virtual_pipeline_model_parallel_size "
            f"{parallel.virtual_pipeline_model_parallel_size} needs packs in multiples of "
            f"parallel.pipeline_model_parallel_size {stages} per data-parallel rank and step, not "
            f"{num_microbatches}; the nearest values of training.global_batch_size are "
            f"{nearest_multiples(training.global_batch_size, samples)}"
        )


def check_budgets(config: PretrainConfig) -> None:
    """Context parallelism shares a pack's images, sequence parallelism then cuts visual and text
    tokens into equal shares each."""
    tp = config.parallel.tensor_model_parallel_size
    cp = config.parallel.context_parallel_size
    per_image, visual = config.model.tokens_per_image, config.data.visual_budget
    if cp > 1 and visual % (cp * per_image):
        fit = visual - visual % (cp * per_image)
        nearest = f"{fit} or {fit + cp * per_image}" if fit else f"{fit + cp * per_image}"
        raise ConfigError(
            f"parallel.context_parallel_size {cp} gives each rank whole images of {per_image} "
            f"tokens; data.visual_budget {visual} is not a multiple of {cp} x {per_image} = "
            f"{cp * per_image}. The nearest values that fit are {nearest}"
        )
    if not config.parallel.sequence_parallel:
        return
    cut = f"parallel.tensor_model_parallel_size {tp}"
    for name, ranks in {"visual_budget": cp, "text_budget": 1}.items():
        tokens = getattr(config.data, name) // ranks
        if tokens % tp:
            shares = f"of {tokens} tokens on each context-parallel rank " * (ranks > 1)
            raise ConfigError(
                f"data.{name} {getattr(config.data, name)} {shares}is not a multiple of {cut}, "
                "which parallel.sequence_parallel needs; the nearest are "
                f"{nearest_multiples(getattr(config.data, name), tp * ranks)}"
            )


def check_fp8_sizes(config: PretrainConfig) -> None:
    """Require widths and numbers of tokens that Transformer Engine can multiply in FP8.

    Its linear layers refuse a rank's tokens where they are no multiple of 8 and rows of a weight
    where they are none of 16, and the weight's gradient is a sum over the gathered tokens, which
    cublasLt wants in multiples of 16. Text tokens pass alone (the output projection, the last
    layer), or all tokens together, or chunks of them.
    """
    execution, parallel, data = config.execution, config.parallel, config.data
    if execution.fp8 == "none":
        return
    _check_fp8_widths(config)
    ranks = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    multiple = math.lcm(16, 8 * ranks)
    text, both = data.text_budget, config.tokens_per_rank
    chunk = execution.savings.ffn_chunk_tokens
    calls = {"data.visual_budget": (data.visual_budget, both)}
    # With all visual tokens in all layers, text tokens are never alone.
    if config.model.attention != "s_attn" or execution.savings.unread_tokens:
        calls = {"data.text_budget": (text, text), **calls}
    if 0 < chunk < both:
        calls["execution.savings.ffn_chunk_tokens"] = (chunk, chunk)
    for name, (value, tokens) in calls.items():
        if tokens % multiple:
            # Of a visual budget each context-parallel rank has its share.
            ranks_of = parallel.context_parallel_size if name == "data.visual_budget" else 1
            step = multiple * ranks_of
            fit = value - tokens % multiple * ranks_of
            nearest = f"{fit} or {fit + step}" if fit > 0 else f"{fit + step}"
            raise ConfigError(
                f"execution.fp8 '{execution.fp8}' needs multiples of 8 tokens per rank and of 16 "
                f"in a tensor-parallel group for Transformer Engine's linear layers; {name} "
                f"{value} makes {tokens} tokens, {tokens / ranks:g} per rank. The nearest values "
                f"that fit are {nearest} (every {step})"
            )


def _check_fp8_widths(config: PretrainConfig) -> None:
    tp, language = config.parallel.tensor_model_parallel_size, config.model.language
    heads = language.num_attention_heads * language.head_dim
    for name, width in (
        ("hidden_size", language.hidden_size),
        ("num_attention_heads * head_dim", heads / tp),
        ("intermediate_size", language.intermediate_size / tp),
    ):
        if width % 16:
            raise ConfigError(
                f"execution.fp8 '{config.execution.fp8}' needs multiples of 16 per tensor-parallel "
                f"rank; model.language.{name} makes {width:g} on each of {tp}: set execution.fp8 "
                "to 'none'"
            )


def check_validation(config: PretrainConfig) -> None:
    """Require data for validation where there is to be some."""
    if config.training.eval_interval and not config.data.validation:
        raise ConfigError(
            f"training.eval_interval is {config.training.eval_interval}, but data.validation names "
            "no data set"
        )


def _full_pack(config: PretrainConfig) -> TokenLayout:
    tokens, grid = config.model.tokens_per_image, config.model.image_grid
    visual, text = config.data.visual_budget, config.data.text_budget
    if visual < tokens:
        raise ConfigError(
            f"data.visual_budget {visual} is smaller than one image of {grid[0]} x {grid[1]} = "
            f"{tokens} tokens; no sample with an image would fit"
        )
    # Of the largest image, where it has tiles.
    squares = ImagePreprocessor(
        config.model.vision.image_size,
        image_fit=config.data.image_fit or "resize",
        image_grid_pinpoints=config.data.image_grid_pinpoints,
    ).max_squares
    squares = min(squares, visual // tokens)
    samples = min(config.training.micro_batch_size, visual // (tokens * squares), text)
    text_lengths = (text // samples,) * samples
    return TokenLayout(
        text_lengths=text_lengths,
        images=tuple(ImageSpan(n // squares, 0, grid) for n in range(samples * squares)),
        visual_budget=visual,
        text_budget=text,
        prompt_lengths=text_lengths,  # the most that visual tokens can see of it
    )
