"""What the layouts ask of a pack's budgets, and FP8 of widths and numbers of tokens."""

import dataclasses

import pytest

from megatron_dattn.config.pretrain import PretrainConfig
from megatron_dattn.data.config import DataConfig
from megatron_dattn.errors import ConfigError
from megatron_dattn.models.config import LanguageConfig, ModelConfig
from megatron_dattn.models.execution import ExactSavings, ExecutionConfig
from megatron_dattn.parallel.config import ParallelConfig
from megatron_dattn.training.run_plan import check_budgets, check_fp8_sizes


def recipe(tp: int, visual: int = 5888, text: int = 2048, chunk: int = 0, fp8: str = "hybrid"):
    """The budgets of the 7B recipe's second stage, in FP8."""
    return PretrainConfig(
        data=DataConfig(visual_budget=visual, text_budget=text),
        execution=ExecutionConfig(fp8=fp8, savings=ExactSavings(ffn_chunk_tokens=chunk)),
        parallel=ParallelConfig(tensor_model_parallel_size=tp, sequence_parallel=tp > 1),
    )


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_the_recipe_fits(tp: int) -> None:
    check_fp8_sizes(recipe(tp))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            recipe(4, visual=5840),
            r"visual_budget 5840 makes 7888 tokens, 1972 per rank.* 5824 or 5856 \(every",
        ),
        (
            recipe(8, visual=5840),
            r"visual_budget 5840 makes 7888 tokens, 986 per rank.* 5824 or 5888 \(every",
        ),
        (recipe(1, text=2056), "text_budget 2056 makes 2056 tokens, 2056 per rank.* 2048 or 2064 "),
        (recipe(1, text=12), r"text_budget 12 makes .* fit are 16 \("),
        (recipe(2, chunk=1000), "ffn_chunk_tokens 1000 makes 1000 tokens, 500 per rank.* 992 or "),
    ],
)
def test_other_numbers_are_refused_with_the_nearest(config: PretrainConfig, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_fp8_sizes(config)


@pytest.mark.parametrize("tp", [1, 2, 3, 4, 8])
def test_what_is_named_as_nearest_fits(tp: int) -> None:
    """Also to what the message promises: shares of 8 and sums of 16."""
    config = recipe(tp, visual=5840, text=48 * tp)
    language = LanguageConfig(num_attention_heads=24, intermediate_size=14592)  # three divides them
    config = dataclasses.replace(config, model=ModelConfig(language=language))
    for name in ("text_budget", "visual_budget"):
        try:
            check_fp8_sizes(config)
        except ConfigError as error:
            value = int(str(error).split(" (every")[0].split()[-1])
            config = dataclasses.replace(
                config, data=dataclasses.replace(config.data, **{name: value})
            )
    check_fp8_sizes(config)
    for tokens in (config.data.text_budget, config.data.visual_budget):
        assert tokens % 16 == tokens % tp == tokens // tp % 8 == 0


def test_without_fp8_or_with_one_chunk_nothing_is_asked() -> None:
    check_fp8_sizes(recipe(8, text=2056, fp8="none"))
    check_fp8_sizes(recipe(2, chunk=10_001))


def test_with_images_in_every_layer_text_alone_may_be_of_any_number() -> None:
    config = recipe(1, visual=5832, text=2056)
    with pytest.raises(ConfigError, match="text_budget 2056"):
        check_fp8_sizes(config)
    savings = ExactSavings(unread_tokens=False)
    check_fp8_sizes(
        dataclasses.replace(
            config,
            model=ModelConfig(attention="s_attn"),
            execution=ExecutionConfig(fp8="hybrid", savings=savings),
        )
    )


def test_widths_that_fp8_cannot_cut_are_refused() -> None:
    config = recipe(2)
    narrow = ModelConfig(language=LanguageConfig(intermediate_size=1040))
    with pytest.raises(ConfigError, match=r"intermediate_size makes 520 on each of 2"):
        check_fp8_sizes(dataclasses.replace(config, model=narrow))


def shared(cp: int, visual: int, tp: int = 1) -> PretrainConfig:
    """Images of 729 tokens over context-parallel ranks."""
    parallel = ParallelConfig(
        context_parallel_size=cp, tensor_model_parallel_size=tp, sequence_parallel=tp > 1
    )
    return PretrainConfig(
        data=DataConfig(visual_budget=visual, text_budget=2048), parallel=parallel
    )


def test_every_context_parallel_rank_has_room_for_whole_images() -> None:
    check_budgets(shared(1, visual=6000))
    check_budgets(shared(2, visual=8 * 729))
    check_budgets(shared(2, visual=8 * 729, tp=4))
    with pytest.raises(ConfigError, match=r"multiple of 2 x 729 = 1458.* are 5832 or 7290"):
        check_budgets(shared(2, visual=6000))
    with pytest.raises(ConfigError, match="values that fit are 2916"):
        check_budgets(shared(4, visual=729))
    with pytest.raises(ConfigError, match="of 2916 tokens on each context-parallel rank is not"):
        check_budgets(shared(2, visual=8 * 729, tp=8))


def test_fp8_counts_a_context_parallel_ranks_tokens() -> None:
    config = shared(2, visual=16 * 729)
    config = dataclasses.replace(config, execution=ExecutionConfig(fp8="hybrid"))
    with pytest.raises(ConfigError, match=r"visual_budget 11664 makes 7880 .* 11648 or 11680 \("):
        check_fp8_sizes(config)
