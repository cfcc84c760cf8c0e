"""Counted operations against torch's FlopCounterMode, `attention` and published formulas.

Products with weights must agree exactly: they are seen as mm, addmm, or bmm into given memory.
Attention is counted by pairs, as kernels differ in the pairs they compute.
"""

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from megatron_dattn.attention import PRESETS
from megatron_dattn.attention.layout import ImageSpan, TokenLayout
from megatron_dattn.models.config import AdapterNorm, ModelConfig
from megatron_dattn.models.execution import ExactSavings, ExecutionConfig
from megatron_dattn.planner.decoder_flops import decoder_flops
from megatron_dattn.planner.flops import (
    ALL_MODULES,
    StepFlops,
    executed_flops,
    model_flops,
)
from megatron_dattn.planner.layer_sizes import LayerSizes
from tests.support.distributed import run_distributed
from tests.support.vlm import tiny_model_config

SAVING = ExactSavings()
NAIVE = ExactSavings(visual_queries=False, folded_output=False, unread_tokens=False)
TINY = tiny_model_config()
# A text-only sample, one with an image before its text, one with two images inside it.
PACK = TokenLayout(
    text_lengths=(5, 7, 6),
    images=(ImageSpan(1, 0, (3, 3)), ImageSpan(2, 2, (3, 3)), ImageSpan(2, 4, (3, 3))),
    visual_budget=30,
    text_budget=20,
    prompt_lengths=(2, 4, 6),
)
TEXT_ONLY = TokenLayout(text_lengths=(9,), images=(), visual_budget=0, text_budget=9)
LINEAR_PARTS = ("adapter", "projections", "ffn", "head")


def weight_products(counter: FlopCounterMode) -> int:
    """What the counter saw as products with a weight."""
    counts = counter.get_flop_counts()["Global"]
    return sum(counts.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))


class GroupedProducts(TorchDispatchMode):
    """Counts products with a weight that are batched over groups of heads.

    They write into memory that is there, which products of scores do not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.bmm.out:
            (batch, rows, inner), columns = args[0].shape, args[1].shape[2]
            self.flops += 2 * batch * rows * inner * columns
        return func(*args, **(kwargs or {}))


def without_scores(flops: StepFlops, images: int, *, recomputed: bool = False) -> int:
    """Forward and backward without attention scores, the vision encoder's included."""
    vision = TINY.vision
    scores = 4 * images * vision.num_patches**2 * vision.hidden_size * vision.num_used_layers
    encoder = flops.parts["vision_encoder"]
    # Scores repeat twice in a backward pass, and once more when they are recomputed.
    passes = bool(encoder.forward) + (2 + recomputed) * bool(encoder.backward)
    return flops.total - flops.parts["attention"].total - passes * scores


@pytest.mark.parametrize("preset", PRESETS)
def test_decoder_layers_are_those_of_the_attention_room(preset: str) -> None:
    language = TINY.language
    sizes = LayerSizes(
        language.hidden_size,
        language.num_attention_heads,
        language.num_key_value_heads,
        language.head_dim,
        language.intermediate_size,
        TINY.vision.hidden_size,
    )
    counted = model_flops(TINY, [PACK], trained=frozenset(), attention=preset).parts
    expected = decoder_flops(PACK, PRESETS[preset], sizes, language.num_hidden_layers)
    for name in ("projections", "attention", "ffn"):
        assert counted[name].forward == getattr(expected, name)


@pytest.mark.parametrize("frozen", [False, True])
def test_text_only_equals_hugging_face_mistral(frozen: bool) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    language = TINY.language
    model = MistralForCausalLM(
        MistralConfig(
            hidden_size=language.hidden_size,
            num_hidden_layers=language.num_hidden_layers,
            num_attention_heads=language.num_attention_heads,
            num_key_value_heads=language.num_key_value_heads,
            head_dim=language.head_dim,
            intermediate_size=language.intermediate_size,
            vocab_size=language.vocab_size,
            tie_word_embeddings=False,
        )
    ).requires_grad_(not frozen)
    embeddings = torch.randn(1, 9, language.hidden_size, requires_grad=True)
    counter = FlopCounterMode(display=False)
    with counter:
        model(inputs_embeds=embeddings, use_cache=False).logits.sum().backward()
    trained = ALL_MODULES if not frozen else ALL_MODULES - {"language_model"}
    counted = model_flops(TINY, [TEXT_ONLY], trained=trained)
    assert weight_products(counter) == sum(counted.parts[part].total for part in LINEAR_PARTS)


@pytest.mark.parametrize("trained", [False, True])
def test_vision_encoder_equals_hugging_face_siglip(trained: bool) -> None:
    """All products, the scores' bmm and the patch convolution included."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    vision = TINY.vision
    model = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=vision.hidden_size,
            num_hidden_layers=vision.num_used_layers,
            num_attention_heads=vision.num_attention_heads,
            intermediate_size=vision.intermediate_size,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            vision_use_head=False,
            attn_implementation="eager",
        )
    ).requires_grad_(trained)
    pixels = torch.randn(3, 3, vision.image_size, vision.image_size)
    counter = FlopCounterMode(display=False)
    with counter:
        features = model(pixel_values=pixels).last_hidden_state
        if trained:
            features.sum().backward()
    modules = ALL_MODULES if trained else frozenset({"language_model"})
    counted = model_flops(TINY, [PACK], trained=modules).parts["vision_encoder"]
    assert counter.get_total_flops() == counted.total


def _engine_products(
    config: ModelConfig, trained: frozenset[str], recompute: str, savings: ExactSavings
) -> int:
    """One rank: count a step of the real model on PACK, every text token labelled."""
    from megatron_dattn.batch import PackedBatch
    from megatron_dattn.models.build import build_model
    from megatron_dattn.parallel.config import ParallelConfig
    from tests.support.megatron import init_model_parallel

    init_model_parallel()
    execution = ExecutionConfig(
        precision="fp32", recompute=recompute, attention_backend="math", savings=savings
    )
    model = build_model(config, ParallelConfig(), execution)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.partition(".")[0] in trained)
    side = config.vision.image_size
    labels = torch.full((PACK.text_budget,), -100)
    labels[: PACK.num_text_tokens] = 1
    batch = PackedBatch(
        layout=PACK,
        input_ids=torch.zeros(PACK.text_budget, dtype=torch.int64),
        labels=labels,
        pixel_values=torch.randn(len(PACK.images), 3, side, side),
        sample_keys=["a", "b", "c"],
    )
    counter, grouped = FlopCounterMode(display=False), GroupedProducts()
    with grouped, counter:
        model(batch).sum().backward()
    return weight_products(counter) + grouped.flops


@pytest.mark.parametrize(
    ("preset", "trained", "recompute", "savings"),
    [
        ("dattn", ALL_MODULES, "none", SAVING),
        ("dattn", ALL_MODULES, "none", NAIVE),
        ("s_attn", ALL_MODULES, "none", ExactSavings(labelled_logits=False)),
        ("dattn", ALL_MODULES, "full", SAVING),
        ("dattn", frozenset({"adapter"}), "none", SAVING),
        ("s_attn", ALL_MODULES, "none", SAVING),
        ("dattn", ALL_MODULES, "none", ExactSavings(ffn_chunk_tokens=16)),
        ("dattn", ALL_MODULES, "full", ExactSavings(ffn_chunk_tokens=16)),
        ("yopo", ALL_MODULES, "none", ExactSavings(ffn_chunk_tokens=16)),
    ],
)
def test_engine_executes_what_is_counted(
    preset: str, trained: frozenset[str], recompute: str, savings: ExactSavings
) -> None:
    config = dataclasses.replace(TINY, attention=preset)
    (seen,) = run_distributed(_engine_products, 1, config, trained, recompute, savings)
    counted = executed_flops(config, [PACK], trained=trained, recompute=recompute, savings=savings)
    assert seen == without_scores(counted, len(PACK.images), recomputed=recompute == "full")


@pytest.mark.parametrize("norm", ["none", "behind"])
def test_the_adapters_count_does_not_depend_on_its_norm(norm: AdapterNorm) -> None:
    config = dataclasses.replace(TINY, adapter=dataclasses.replace(TINY.adapter, norm=norm))
    trained = frozenset({"adapter"})
    (seen,) = run_distributed(_engine_products, 1, config, trained, "none", SAVING)
    counted = executed_flops(config, [PACK], trained=trained, savings=SAVING)
    assert seen == without_scores(counted, len(PACK.images))


def test_the_savings_are_a_sixth_of_a_visual_tokens_work() -> None:
    """In Mistral-7B; kernels of the score products aside."""
    one_image = TokenLayout((1,), (ImageSpan(0, 0, (27, 27)),), 729, 1)
    model = ModelConfig()
    saved, naive = (
        executed_flops(model, [one_image], savings=savings) for savings in (SAVING, NAIVE)
    )

    def decoder(flops: StepFlops) -> int:
        return flops.parts["projections"].total + flops.parts["ffn"].total

    # Of a token's 14.23 GFLOP less 0.27 for a head: queries 1.07, output 0.81, last layer 0.36.
    share = (1.07 + 0.81 + 0.36) / (14.23 - 0.27)
    assert 1 - decoder(saved) / decoder(naive) == pytest.approx(share, abs=2e-3)


def test_dattn_needs_less_than_the_engine_and_than_self_attention() -> None:
    dattn = model_flops(TINY, [PACK])
    s_attn = model_flops(TINY, [PACK], attention="s_attn")
    tokens, layers = PACK.num_visual_tokens, TINY.language.num_hidden_layers
    queries = (
        3 * 2 * tokens * 40 * (4 * 16) * layers
    )  # forward and two gradients of a 40 x 64 product
    assert s_attn.parts["projections"].total - dattn.parts["projections"].total == queries
    assert s_attn.parts["ffn"] == dattn.parts["ffn"]
    assert dattn.total < s_attn.total
    assert dattn.total < executed_flops(TINY, [PACK], savings=NAIVE).total


def test_padding_and_unlabelled_tokens_are_free() -> None:
    wide = dataclasses.replace(PACK, visual_budget=64, text_budget=64)
    assert model_flops(TINY, [wide]) == model_flops(TINY, [PACK])
    some = model_flops(TINY, [PACK], labelled_tokens=3).parts["head"].forward
    assert some == 3 * 2 * 40 * 64


def test_a_step_is_the_sum_of_its_packs() -> None:
    both = model_flops(TINY, [PACK, TEXT_ONLY])
    assert both == model_flops(TINY, [PACK]) + model_flops(TINY, [TEXT_ONLY])


def test_mistral_7b_on_nine_thousand_visual_tokens() -> None:
    """S-Attn costs 1.26 times D-Attn at |V| = 9k, |T| = 256: the FFN dominates, not the scores."""
    config = ModelConfig()
    layout = TokenLayout((256,), (ImageSpan(0, 0, (96, 96)),), 9216, 256)
    language = ("projections", "attention", "ffn")

    def cost(preset: str) -> int:
        parts = model_flops(config, [layout], attention=preset).parts
        return sum(parts[name].total for name in language)

    assert cost("s_attn") / cost("dattn") == pytest.approx(1.26, abs=0.01)
