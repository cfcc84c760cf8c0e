"""The choice between local and Transformer Engine modules, and what checkpoints call the norms."""

import pytest
from megatron.core.transformer.identity_op import IdentityOp

from megatron_dattn.attention import PRESETS
from megatron_dattn.errors import UserError
from megatron_dattn.models import layer_specs
from megatron_dattn.models.config import LanguageConfig
from megatron_dattn.models.execution import ExactSavings, ExecutionConfig
from megatron_dattn.models.layer_specs import resolve_implementation
from tests.support.vlm import tiny_model


@pytest.mark.parametrize("installed", [False, True])
def test_auto_takes_transformer_engine_where_it_is(monkeypatch, installed):
    monkeypatch.setattr(layer_specs, "te_failure", lambda: None if installed else "it is gone")
    expected = "transformer_engine" if installed else "local"
    assert resolve_implementation(ExecutionConfig()) == expected
    assert resolve_implementation(ExecutionConfig(transformer_impl="local")) == "local"


@pytest.mark.parametrize(
    ("requested", "fp8", "installed", "words"),
    [
        ("transformer_engine", "none", False, "cannot be used: it is gone; install"),
        ("auto", "hybrid", False, "execution.fp8 'hybrid' needs Transformer Engine"),
        ("local", "e4m3", True, "execution.fp8 'e4m3' needs Transformer Engine"),
        ("apex", "none", True, "'apex' is unknown"),
    ],
)
def test_impossible_choices_are_refused_by_name(monkeypatch, requested, fp8, installed, words):
    monkeypatch.setattr(layer_specs, "te_failure", lambda: None if installed else "it is gone")
    with pytest.raises(UserError, match=words):
        resolve_implementation(ExecutionConfig(transformer_impl=requested, fp8=fp8))


def test_fp8_that_the_device_lacks_is_refused_with_its_reason(monkeypatch):
    monkeypatch.setattr(layer_specs, "te_failure", lambda: None)
    monkeypatch.setattr(layer_specs, "fp8_failure", lambda recipe: f"no {recipe} here")
    with pytest.raises(UserError, match=r"fp8_recipe 'blockwise': no blockwise here; choose"):
        resolve_implementation(ExecutionConfig(fp8="hybrid", fp8_recipe="blockwise"))
    assert resolve_implementation(ExecutionConfig(fp8_recipe="blockwise")) == "transformer_engine"


def test_transformer_engine_layers_own_their_norms(monkeypatch):
    names = ("Column", "Row", "NormColumn", "Norm")
    column, row, norm_column, norm = (type(name, (), {}) for name in names)
    monkeypatch.setattr(layer_specs, "_linears", lambda implementation: (column, row))
    monkeypatch.setattr(layer_specs, "_te_norm_linear", lambda: norm_column)
    monkeypatch.setattr(layer_specs, "_te_norm", lambda: norm)
    options = {"language": LanguageConfig(), "savings": ExactSavings(), "feature_size": 8}
    for preset, fused in (("dattn", True), ("yopo", False)):
        block = layer_specs.language_block_spec(
            "transformer_engine", 3, preset=PRESETS[preset], **options
        )
        layer = block.layer_specs[0].submodules
        assert [spec.params["last_on_pipeline_stage"] for spec in block.layer_specs] == [
            False,
            False,
            True,
        ]
        assert block.layer_norm is layer.input_layernorm is norm
        assert layer.pre_mlp_layernorm is (IdentityOp if fused else norm)
        assert layer.mlp.submodules.linear_fc1 is (norm_column if fused else column)
        assert layer.self_attention.submodules.linear_qkv is column
        assert layer.self_attention.submodules.linear_proj is layer.mlp.submodules.linear_fc2 is row
    vision = layer_specs.vision_block_spec("transformer_engine", 2)
    assert vision.layer_norm is None
    assert vision.layer_specs[0].submodules.input_layernorm is IdentityOp


@pytest.mark.usefixtures("one_process")
def test_checkpoints_call_local_norms_as_fused_layers_would():
    stored = {entry.key for entry in tiny_model().sharded_state_dict().values()}
    for module in ("language_model.decoder", "vision_model.encoder"):
        assert f"{module}.layers.self_attention.linear_qkv.layer_norm_weight" in stored
        assert f"{module}.layers.mlp.linear_fc1.layer_norm_weight" in stored
    assert not any("input_layernorm" in key or "pre_mlp_layernorm" in key for key in stored)
    assert "language_model.decoder.final_layernorm.weight" in stored
