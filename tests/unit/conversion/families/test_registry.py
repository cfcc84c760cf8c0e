"""Families are found by model type, read configs as Hugging Face does, and lose no bit."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from megatron_dattn.conversion.families import (
    clip,
    dattn,
    gemma2,
    llama,
    llava,
    mistral,
    qwen2,
    qwen3,
    siglip,
)
from megatron_dattn.conversion.families.key_names import KeyNames, key_names
from megatron_dattn.conversion.families.registry import (
    WHOLE_MODELS,
    language_family,
    language_rules,
    vision_family,
    vision_rules,
)
from megatron_dattn.conversion.families.weight_map import PaddedVocabulary, Rule, check_tensors
from megatron_dattn.errors import CheckpointError
from megatron_dattn.models.config import LanguageConfig, VisionConfig

SIZES = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 67,  # padded to 128 rows
}
VISION_SIZES = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 8,
}
LANGUAGE_MODELS = {
    "mistral": (MistralForCausalLM, MistralConfig),
    "llama": (LlamaForCausalLM, LlamaConfig),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config),
}
VISION_MODELS = {
    "clip": (CLIPVisionModel, CLIPVisionConfig),
    "siglip": (SiglipVisionModel, SiglipVisionConfig),
}


def assert_no_bit_is_lost(rules: list[Rule], model: PreTrainedModel, unused: Any) -> None:
    """Every tensor of the model is used, or known not to be, and comes back as it went in."""
    weights = model.state_dict()
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    if getattr(model.config, "tie_word_embeddings", False):
        shapes.pop("lm_head.weight", None)  # files of tied models lack it
    check_tensors(rules, shapes, unused=unused, origin="the model")
    for rule in rules:
        parts = [weights[name] for name in rule.sources]
        again = rule.layout.split(rule.layout.join(parts))
        for name, before, after in zip(rule.sources, parts, again, strict=True):
            assert torch.equal(before, after), name


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_language_models_come_back_bit_by_bit(name, tie):
    model_class, config_class = LANGUAGE_MODELS[name]
    model = model_class(config_class(**SIZES, tie_word_embeddings=tie)).to(torch.bfloat16)
    family = language_family(model.config.to_dict())
    language = family.language_config(model.config.to_dict())
    assert language.family == name
    assert language.tie_word_embeddings == tie
    assert_no_bit_is_lost(language_rules(language), model, family.unused_prefixes(language))


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_rotary_tables_of_old_checkpoints_are_not_unexpected(name):
    model_class, config_class = LANGUAGE_MODELS[name]
    model = model_class(config_class(**SIZES, tie_word_embeddings=False))
    family = language_family(model.config.to_dict())
    language = family.language_config(model.config.to_dict())
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    table = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    rules, unused = language_rules(language), family.unused_prefixes(language)
    stored = shapes | {table.format(layer): (4,) for layer in range(SIZES["num_hidden_layers"])}
    check_tensors(rules, stored, unused=unused, origin="old")
    beyond = stored | {table.format(SIZES["num_hidden_layers"]): (4,)}
    with pytest.raises(CheckpointError, match="unexpected"):
        check_tensors(rules, beyond, unused=unused, origin="old")


@pytest.mark.parametrize("feature_layer", [-1, -2])
@pytest.mark.parametrize("name", VISION_MODELS)
def test_vision_encoders_come_back_bit_by_bit(name, feature_layer):
    model_class, config_class = VISION_MODELS[name]
    model = model_class(config_class(**VISION_SIZES))
    family = vision_family(model.config.to_dict())
    vision = family.vision_config(model.config.to_dict(), feature_layer)
    assert vision.family == name
    assert vision.feature_layer == feature_layer
    unused = family.unused_prefixes(vision, vision.num_hidden_layers)
    assert_no_bit_is_lost(vision_rules(vision), model, unused)


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": True, "rope_theta": 5.0, "max_position_embeddings": 77}],
)
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_configs_that_are_written_read_back_as_they_were(name, changes):
    _, config_class = LANGUAGE_MODELS[name]
    family = language_family({"model_type": name})
    language = replace(family.language_config(config_class(**SIZES).to_dict()), **changes)
    written = family.hf_config(language)
    assert family.language_config(written) == language
    # And Hugging Face's class, which knows more fields, understands them so.
    assert family.language_config(config_class(**written).to_dict()) == language


@pytest.mark.parametrize("name", VISION_MODELS)
def test_vision_configs_read_back_as_they_were(name):
    _, config_class = VISION_MODELS[name]
    family = vision_family({"model_type": name})
    vision = family.vision_config(config_class(**VISION_SIZES, layer_norm_eps=1e-3).to_dict())
    written = family.hf_config(vision, vision.num_hidden_layers)
    assert family.vision_config(config_class(**written).to_dict()) == vision
    cut = family.vision_config(family.hf_config(vision, vision.num_used_layers), -1)
    assert cut.num_used_layers == vision.num_used_layers


def test_padding_is_zeros():
    joined = PaddedVocabulary(3, 8).join([torch.ones(3, 2)])
    assert joined.shape == (8, 2)
    assert joined[:3].eq(1).all()
    assert not joined[3:].any()


@pytest.mark.parametrize(
    ("module", "config_class"),
    [
        (mistral, MistralConfig),
        (llama, LlamaConfig),
        (gemma2, Gemma2Config),
        (qwen2, Qwen2Config),
        (qwen3, Qwen3Config),
    ],
)
def test_language_defaults_are_hugging_faces(module, config_class):
    assert_defaults(module.DEFAULTS, config_class().to_dict())


@pytest.mark.parametrize(
    ("module", "config_class"), [(clip, CLIPVisionConfig), (siglip, SiglipVisionConfig)]
)
def test_vision_defaults_are_hugging_faces(module, config_class):
    assert_defaults(module.DEFAULTS, config_class().to_dict())


def assert_defaults(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    theirs |= theirs.get("rope_parameters") or {}
    for name, value in ours.items():
        # Llama says "as many as query heads" by None, and fills the number in.
        expected = theirs["num_attention_heads"] if value is None else value
        assert theirs[name] == expected, name


def test_whole_models_are_sent_to_their_flag():
    assert (llava.MODEL_TYPE, dattn.MODEL_TYPE) == WHOLE_MODELS
    for kind in WHOLE_MODELS:
        for find in (language_family, vision_family):
            with pytest.raises(CheckpointError, match=rf"'{kind}'; .*whole model: give .* --model"):
                find({"model_type": kind})


def test_what_is_supported_is_named():
    supported = "gemma2, llama, mistral, qwen2, qwen3"
    with pytest.raises(CheckpointError, match=f"'phi3'; supported: {supported}"):
        language_family({"model_type": "phi3"})
    with pytest.raises(CheckpointError, match="'siglip2'; supported: clip, clip_vision_model"):
        vision_family({"model_type": "siglip2"})
    with pytest.raises(CheckpointError, match="of type 'None'"):
        language_family({})


@pytest.mark.parametrize(
    ("module", "changes", "message"),
    [
        (mistral, {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported, only silu"),
        (llama, {"mlp_bias": True}, "mlp_bias True"),
        (gemma2, {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        (gemma2, {"hidden_activation": "gelu"}, "only gelu_pytorch_tanh"),
        (gemma2, {"layer_types": ["full_attention"] * 3}, "only sliding and full attention in"),
        (gemma2, {"vocab_size": None}, "lacks vocab_size"),
        (qwen2, {"use_sliding_window": True}, "use_sliding_window True is not supported"),
        (qwen2, {"layer_types": ["sliding_attention"]}, "only full_attention"),
        (qwen3, {"attention_bias": True}, "attention_bias True"),
        (qwen3, {"layer_types": ["sliding_attention"]}, "only full_attention"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(module, changes, message):
    with pytest.raises(CheckpointError, match=message):
        module.language_config({**SIZES, **changes})


@pytest.mark.parametrize(
    ("module", "changes", "message"),
    [
        (llama, {"rope_theta": None, "rope_parameters": None}, "has rope_theta null"),
        (llama, {"rms_norm_eps": "1e-5"}, r'has rms_norm_eps "1e-5", but it must be a number'),
        (llama, {"vocab_size": 64.0}, r"has vocab_size 64\.0, but it must be a whole number"),
        (llama, {"num_attention_heads": 0}, r"has num_attention_heads 0"),
        (llama, {"num_hidden_layers": True}, "has num_hidden_layers true"),
        (llama, {"num_key_value_heads": "2"}, 'has num_key_value_heads "2"'),
        (llama, {"tie_word_embeddings": "no"}, 'has tie_word_embeddings "no", .* true or false'),
        (llama, {"rms_norm_eps": float("inf")}, "has rms_norm_eps Infinity"),
        (mistral, {"sliding_window": "none"}, 'has sliding_window "none"'),
        (mistral, {"head_dim": 8.5}, r"has head_dim 8\.5"),
        (mistral, {"max_position_embeddings": [1]}, r"has max_position_embeddings \[1\]"),
        (gemma2, {"attn_logit_softcapping": "50"}, 'has attn_logit_softcapping "50"'),
        (gemma2, {"query_pre_attn_scalar": None}, "has query_pre_attn_scalar null"),
        (gemma2, {"hidden_activation": None}, "hidden_activation 'None' is not supported"),
    ],
)
def test_values_of_the_wrong_type_are_named(module, changes, message):
    with pytest.raises(CheckpointError, match=rf"^(the language model's config\.json )?{message}"):
        module.language_config({**SIZES, **changes})


@pytest.mark.parametrize("module", [clip, siglip])
@pytest.mark.parametrize("is_dual", [False, True])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": [384, 384]}, r"has image_size \[384, 384\], but it must be a whole number"),
        ({"patch_size": "14"}, 'has patch_size "14"'),
        ({"layer_norm_eps": "small"}, 'has layer_norm_eps "small"'),
        ({"hidden_size": None}, "has hidden_size null"),
    ],
)
def test_values_of_the_wrong_type_are_named_in_encoders(module, is_dual, changes, message):
    section = {**VISION_SIZES, **changes}
    config = {"vision_config": section} if is_dual else section
    with pytest.raises(CheckpointError, match=rf"^the vision encoder's config\.json {message}"):
        module.vision_config(config)


@pytest.mark.parametrize("section", [None, [], "siglip"])
def test_a_dual_encoder_s_section_is_an_object(section):
    with pytest.raises(CheckpointError, match=r"has vision_config .*, but it must be an object"):
        siglip.vision_config({"vision_config": section})


def test_published_gemma2_9b():
    """Its config.json, of the fields that matter."""
    config = {
        "model_type": "gemma2",
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "num_attention_heads": 16,
        "num_hidden_layers": 42,
        "num_key_value_heads": 8,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "vocab_size": 256000,
    }
    language = gemma2.language_config(config)
    assert language.tie_word_embeddings  # by default
    assert language.window(0) == 4096
    assert language.window(1) is None
    assert language.embedding_scale == 3584**0.5


# llava-hf/llava-1.5-7b-hf's config.json: it leaves out what its sections' classes have by default.
LLAVA_7B = {
    "model_type": "llava",
    "image_token_index": 32000,
    "projector_hidden_act": "gelu",
    "text_config": {
        "model_type": "llama",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
        "vocab_size": 32064,
    },
    "tie_word_embeddings": False,
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}


def test_published_llava_7b():
    model = llava.model_from_config(LLAVA_7B)
    assert model.attention == "s_attn"
    assert model.adapter_norm == "none"
    assert model.tokens_per_image == 576
    assert model.vision == VisionConfig(
        family="clip",
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        image_size=336,
        patch_size=14,
        layer_norm_eps=1e-5,
        hidden_act="quick_gelu",
    )
    assert model.language == LanguageConfig(
        family="llama",
        num_key_value_heads=32,
        intermediate_size=11008,
        vocab_size=32064,
        rope_theta=10_000.0,
        max_position_embeddings=4096,
    )


SIGLIP_SECTION = {"model_type": "siglip_vision_model"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llava_next"}, "'llava_next'; supported: llava"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act relu"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias False"),
        ({"vision_feature_layer": [-2, -5]}, r"vision_feature_layer \[-2, -5\]"),
        ({"vision_feature_layer": 0}, "vision_feature_layer 0"),
        ({"vision_feature_layer": -25}, "vision_feature_layer -25"),
        ({"vision_feature_select_strategy": "full"}, "'full' is not supported with clip_vision"),
        ({"vision_config": SIGLIP_SECTION}, "'default' is not supported with siglip_vision"),
        ({"vision_config": {"num_hidden_layers": "2"}}, 'has num_hidden_layers "2"'),
        ({"text_config": {"model_type": "llama", "vocab_size": 1.5}}, r"has vocab_size 1\.5"),
        ({"tie_word_embeddings": 1}, "has tie_word_embeddings 1"),
        ({"vision_config": None}, "has vision_config null, but it must be an object"),
        ({"text_config": {"model_type": "gemma2"}}, "'gemma2' is not supported: versions"),
        ({"text_config": {"model_type": "phi3"}}, "'phi3'; supported: gemma2"),
        ({"image_rows_added": -1}, "has image_rows_added -1"),
    ],
    ids=str,
)
def test_llavas_that_differ_are_refused_by_name(changes, message):
    with pytest.raises(CheckpointError, match=message):
        llava.model_from_config({**LLAVA_7B, **changes})


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("deeper", [True, False])
def test_llavas_names_are_recognised(nested, deeper):
    vision = "vision_tower.vision_model." if deeper else "vision_tower."
    keys = KeyNames(nested, vision)
    rules = llava.weight_rules(llava.model_from_config(LLAVA_7B), keys)
    names = [name for part in rules.values() for rule in part for name in rule.sources]
    assert len(names) == len(set(names))
    assert key_names(names) == keys
    head = "lm_head.weight" if nested else "language_model.lm_head.weight"
    first = "model.language_model.layers.0." if nested else "language_model.model.layers.0."
    assert head in names
    assert first + "self_attn.q_proj.weight" in names
