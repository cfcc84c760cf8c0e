"""Which names are additions to the pretrained language model."""

import pytest

from megatron_dattn.models.added_parameters import comes_with_preset, is_added

LAYERS = "language_model.decoder.layers"


@pytest.mark.parametrize("layer", ["", "0.", "31."])  # none in a checkpoint's keys
@pytest.mark.parametrize(
    "name",
    [
        "self_attention.gate",
        "cross_attention.linear_q.weight",
        "cross_attention.linear_kv.weight",
        "cross_attention.linear_proj.weight",
        "visual_projector.norm.weight",
        "visual_projector.linear_fc2.bias",
    ],
)
def test_additions(layer: str, name: str) -> None:
    assert is_added(f"{LAYERS}.{layer}{name}")
    assert comes_with_preset(f"{LAYERS}.{layer}{name}")


@pytest.mark.parametrize(
    "name",
    [
        "adapter.norm.weight",
        "language_model.embedding.word_embeddings.weight",
        f"{LAYERS}.0.self_attention.linear_qkv.weight",
        f"{LAYERS}.0.self_attention.gate_norm.weight",
        f"{LAYERS}.0.mlp.linear_fc1.weight",
        "vision_model.encoder.layers.0.self_attention.gate",
    ],
)
def test_everything_else(name: str) -> None:
    assert not is_added(name)
    assert not comes_with_preset(name)


def test_positions_are_the_adapter_s_and_the_preset_s() -> None:
    assert comes_with_preset("adapter.positions.rows")
    assert not is_added("adapter.positions.rows")
