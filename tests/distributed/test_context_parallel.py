"""Context-parallel ranks together give the losses and gradients of one process, in float64.

The packs are those of the other layouts: ragged samples of three, two, one and no images, so that
with four ranks one of them always has none, and samples whose images are on several ranks.
"""

from collections import Counter

import pytest
from megatron.core import parallel_state

from megatron_dattn.attention import PRESETS
from megatron_dattn.parallel.config import ParallelConfig
from megatron_dattn.parallel.context.exchange import bytes_per_layer
from megatron_dattn.parallel.context.shares import take_share
from tests.distributed.test_model_parallel import (
    CHUNKED,
    NAIVE,
    Case,
    assert_step_equals_one_process,
)
from tests.support.collectives import Collectives
from tests.support.distributed import run_distributed
from tests.support.megatron import init_model_parallel
from tests.support.vlm import LANGUAGE, make_batch, tiny_model, tiny_model_config
from tests.unit.parallel.context.test_supported import SERVED

STAGE_1 = ("vision_model", "language_model")
OTHER_PRESETS = [name for name in PRESETS if name in SERVED and name != "dattn"]


def _cases(family: str) -> list[Case]:
    """What has to hold for every family, of stage 3 and stage 1."""
    layouts = [
        Case(context=2, family=family),
        Case(context=4, family=family),
        Case(context=2, tensor=2, sequence_parallel=True, family=family),
        Case(context=2, pipeline=2, family=family),
    ]
    return [
        Case(**{**vars(case), "frozen": frozen}) for case in layouts for frozen in ((), STAGE_1)
    ]


CASES = [
    Case(**{**vars(case), "double": True})
    for case in [
        *_cases("mistral"),
        *_cases("gemma2"),
        *(Case(context=2, preset=preset) for preset in OTHER_PRESETS),
        *(Case(context=2, preset=p, family="gemma2") for p in ("ee_mllm", "dattn_cascade")),
        Case(context=2, data=2),
        Case(context=2, recompute="full"),
        Case(context=2, recompute="selective", savings=CHUNKED, tie=True),
        Case(context=2, savings=NAIVE),
        Case(context=2, vision="clip", frozen=("vision_model",)),
        Case(context=2, tensor=2, sequence_parallel=True, preset="saisa", recompute="full"),
        Case(context=2, tensor=2, encoder="weights"),
        Case(context=2, pipeline=2, tie=True, recompute="full"),
        Case(context=4, preset="dattn_sigmoid"),
    ]
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_equals_one_process(case: Case) -> None:
    # megatron-core's cross entropy over a vocabulary that is cut computes in fp32.
    tolerance = 1e-12 if case.tensor == 1 else 1e-6
    assert_step_equals_one_process(case, CASES, of_losses=tolerance, of_gradients=tolerance)


TEXT_BUDGET = 32


def _sent(ranks: int, preset: str) -> dict[tuple[int, int], Counter[str]]:
    """Bytes within the context-parallel group in a forward and backward pass, by layers and images
    of the pack."""
    init_model_parallel(context_parallel=ranks)
    found = {}
    for layers in (2, 3):
        config = tiny_model_config(preset, num_hidden_layers=layers)
        model = tiny_model(config, parallel=ParallelConfig(context_parallel_size=ranks))
        for images in (4, 64):
            budgets = (images * config.tokens_per_image, TEXT_BUDGET)
            batch = make_batch([9, 7], [(2,) * images], budgets=budgets, grid=config.image_grid)
            group = parallel_state.get_context_parallel_group()
            with Collectives(group) as collectives:
                model(take_share(batch, group.rank(), ranks)).sum().backward()
            found[layers, images] = collectives.sent
    return found


@pytest.mark.parametrize("preset", ["dattn", "dattn_cascade"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_what_a_layer_sends_does_not_depend_on_the_visual_tokens(ranks: int, preset: str) -> None:
    heads, head_dim = LANGUAGE.num_attention_heads, LANGUAGE.head_dim
    expected = sum(bytes_per_layer(TEXT_BUDGET, heads, head_dim, ranks))
    for sent in run_distributed(_sent, ranks, ranks, preset):
        for images in (4, 64):
            two, three = sent[2, images].total(), sent[3, images].total()
            assert three - two == expected
            assert two == 2 * expected, "layers alone send something"
