"""Building: sizes that do not fit are refused, weights are repeatable, meta costs nothing."""

import pytest
import torch

from megatron_dattn.errors import ConfigError
from megatron_dattn.models.build import build_model, check_model_sizes
from megatron_dattn.models.config import ModelConfig
from megatron_dattn.models.execution import ExecutionConfig
from megatron_dattn.parallel.config import ParallelConfig
from megatron_dattn.runtime.distributed import seed_everything
from tests.support.vlm import tiny_model_config

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.mark.parametrize(
    ("language", "tp", "words"),
    [
        ({"num_key_value_heads": 1}, 2, "does not divide language.num_key_value_heads 1"),
        ({"intermediate_size": 57}, 2, "model.language.intermediate_size 57"),
        ({}, 4, "language.num_key_value_heads 2"),
    ],
)
def test_sizes_that_cannot_be_cut_are_refused(language, tp, words):
    model = tiny_model_config(**language)
    parallel = ParallelConfig(tensor_model_parallel_size=tp)
    with pytest.raises(ConfigError, match=words):
        check_model_sizes(model, parallel, ExecutionConfig())


def test_heads_of_the_encoder_must_be_cut_where_its_weights_are():
    model = tiny_model_config(num_attention_heads=8, num_key_value_heads=4)
    parallel = ParallelConfig(tensor_model_parallel_size=4)
    check_model_sizes(model, parallel, ExecutionConfig())
    with pytest.raises(ConfigError, match=r"does not divide model\.vision\.num_attention_heads 2"):
        check_model_sizes(model, parallel, ExecutionConfig(encoder_tp_mode="weights"))


def test_layers_must_fill_the_pipeline():
    parallel = ParallelConfig(pipeline_model_parallel_size=3)
    with pytest.raises(ConfigError, match=r"3 does not divide the language model's 2 layers"):
        check_model_sizes(tiny_model_config(), parallel, ExecutionConfig())


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((None, None), (14, 14, 14)),
        ((10, None), (10, 16, 16)),
        ((None, 12), (15, 15, 12)),
        ((13, 12), (13, 17, 12)),
    ],
)
def test_stages_may_be_uneven(sizes, expected):
    assert _pipeline(3, *sizes).layers_per_pipeline_stage(42) == expected


def _pipeline(stages, first=None, last=None):
    return ParallelConfig(
        pipeline_model_parallel_size=stages,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
    )


def test_a_split_that_works_is_named():
    with pytest.raises(ConfigError) as caught:
        _pipeline(4).layers_per_pipeline_stage(42)
    assert "num_layers_in_first_pipeline_stage 10 and" in str(caught.value)
    assert "num_layers_in_last_pipeline_stage 10" in str(caught.value)
    assert _pipeline(4, 10, 10).layers_per_pipeline_stage(42) == (10, 11, 11, 10)


@pytest.mark.parametrize(
    ("stages", "first", "last", "words"),
    [
        (2, 20, 20, "of which the first has 20, of which the last has 20"),
        (3, 40, 2, "does not divide"),  # nothing is left for the middle
        (2, 43, None, "does not divide"),
    ],
)
def test_splits_that_do_not_add_up_are_refused(stages, first, last, words):
    with pytest.raises(ConfigError, match=words):
        _pipeline(stages, first, last).layers_per_pipeline_stage(42)


@pytest.mark.parametrize(("stages", "first"), [(1, 3), (2, 0)])
def test_uneven_stages_need_stages(stages, first):
    with pytest.raises(ConfigError, match=r"parallel\.num_layers_in_first_pipeline_stage"):
        _pipeline(stages, first)


def test_the_same_seed_gives_the_same_weights():
    models = []
    for _ in range(2):
        seed_everything(4)
        execution = ExecutionConfig(precision="fp32")
        models.append(build_model(tiny_model_config(), ParallelConfig(), execution))
    pairs = zip(models[0].named_parameters(), models[1].parameters(), strict=True)
    assert all(torch.equal(a, b) for (_, a), b in pairs)


def test_stages_hold_their_parts_only():
    execution = ExecutionConfig(precision="fp32")
    config = tiny_model_config()
    first = build_model(config, ParallelConfig(), execution, post_process=False)
    last = build_model(config, ParallelConfig(), execution, pre_process=False)
    assert not hasattr(first.language_model, "output_layer")
    assert last.vision_model is None
    assert last.adapter is None
    assert not hasattr(last.language_model, "embedding")


@pytest.mark.parametrize("preset", ["dattn", "s_attn"])
def test_positions_exist_where_the_preset_says(preset):
    execution = ExecutionConfig(precision="fp32")
    model = build_model(tiny_model_config(preset), ParallelConfig(), execution)
    names = [name for name, _ in model.named_parameters() if "positions" in name]
    expected = ["adapter.positions.rows", "adapter.positions.columns"]
    assert names == (expected if preset == "dattn" else [])


def test_the_7b_model_on_the_meta_device():
    fp8 = ExecutionConfig(transformer_impl="transformer_engine", fp8="hybrid")
    model = build_model(ModelConfig(), ParallelConfig(), fp8, device="meta")
    counts = {
        name: sum(p.numel() for p in getattr(model, name).parameters())
        for name in ("vision_model", "adapter", "language_model")
    }
    assert {param.device.type for param in model.parameters()} == {"meta"}
    # Mistral-7B-v0.3 has 7,248,023,552 parameters; 26 of so400m's 27 layers are built.
    assert counts["language_model"] == 7_248_023_552
    layer = 4 * (1152 * 1152 + 1152) + 2 * 1152 * 4304 + 4304 + 1152 + 4 * 1152
    assert counts["vision_model"] == 26 * layer + 1152 * (3 * 14 * 14 + 1) + 729 * 1152
    assert counts["adapter"] == 1152 + 1153 * 4096 + 4097 * 4096 + 2 * 64 * 4096
