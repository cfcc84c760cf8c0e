"""The choice between local and Transformer Engine modules, and what checkpoints call the norms."""

import pytest
from megatron.core.transformer.identity_op import IdentityOp

from megatron_dattn.errors import UserError
from megatron_dattn.models import layer_specs
from megatron_dattn.models.layer_specs import resolve_implementation
from tests.support.vlm import tiny_model


@pytest.mark.parametrize("installed", [False, True])
def test_auto_takes_transformer_engine_where_it_is(monkeypatch, installed):
    monkeypatch.setattr(layer_specs, "has_te", lambda: installed)
    expected = "transformer_engine" if installed else "local"
    assert resolve_implementation("auto", "none") == expected
    assert resolve_implementation("local", "none") == "local"


@pytest.mark.parametrize(
    ("requested", "fp8", "installed", "words"),
    [
        ("transformer_engine", "none", False, "transformer_engine is not installed"),
        ("auto", "hybrid", False, "training.fp8 'hybrid' needs Transformer Engine"),
        ("local", "e4m3", True, "training.fp8 'e4m3' needs Transformer Engine"),
        ("apex", "none", True, "'apex' is unknown"),
    ],
)
def test_impossible_choices_are_refused_by_name(monkeypatch, requested, fp8, installed, words):
    monkeypatch.setattr(layer_specs, "has_te", lambda: installed)
    with pytest.raises(UserError, match=words):
        resolve_implementation(requested, fp8)


def test_transformer_engine_layers_own_their_norms(monkeypatch):
    column, row, norm = (type(name, (), {}) for name in ("Column", "Row", "Norm"))
    monkeypatch.setattr(layer_specs, "_te_linears", lambda: (column, row))
    monkeypatch.setattr(layer_specs, "_te_norm", lambda: norm)
    block = layer_specs.language_block_spec("transformer_engine", 3)
    layer = block.layer_specs[0].submodules
    assert len(block.layer_specs) == 3
    assert block.layer_norm is norm
    assert layer.input_layernorm is layer.pre_mlp_layernorm is IdentityOp
    assert layer.self_attention.submodules.linear_qkv is layer.mlp.submodules.linear_fc1 is column
    assert layer.self_attention.submodules.linear_proj is layer.mlp.submodules.linear_fc2 is row
    assert layer.sharded_state_dict_keys_map == {}
    assert layer_specs.vision_block_spec("transformer_engine", 2).layer_norm is None


@pytest.mark.usefixtures("one_process")
def test_checkpoints_call_local_norms_as_fused_layers_would():
    stored = {entry.key for entry in tiny_model().sharded_state_dict().values()}
    for module in ("language_model.decoder", "vision_model.encoder"):
        assert f"{module}.layers.self_attention.linear_qkv.layer_norm_weight" in stored
        assert f"{module}.layers.mlp.linear_fc1.layer_norm_weight" in stored
    assert not any("input_layernorm" in key or "pre_mlp_layernorm" in key for key in stored)
    assert "language_model.decoder.final_layernorm.weight" in stored
