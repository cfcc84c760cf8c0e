"""Rotary positions are read in both spellings; what would change angles unseen is refused."""

import pytest
from transformers import LlamaConfig

from megatron_dattn.attention.rotary_scaling import RotaryScaling
from megatron_dattn.conversion.families import llama
from megatron_dattn.errors import CheckpointError, ConfigError

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
}
# Llama-3.1-8B's.
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SCALING = RotaryScaling(**LLAMA3)
NEW = {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3}
OLD = {"rope_type": "llama3", **LLAMA3}


@pytest.mark.parametrize(
    "written",
    [
        {"rope_theta": 5e5, "rope_scaling": OLD},
        {"rope_theta": 5e5, "rope_scaling": OLD | {"type": "llama3"}},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"type": "llama3"}},
        {"rope_parameters": NEW},
        {"rope_theta": 5e5, "rope_scaling": OLD, "rope_parameters": NEW},
        {"rope_parameters": NEW | {"partial_rotary_factor": 1.0, "attention_factor": None}},
    ],
)
def test_both_spellings_are_read(written):
    language = llama.language_config(SIZES | written)
    assert (language.rope_theta, language.rope_scaling) == (5e5, SCALING)
    assert llama.language_config(llama.hf_config(language)) == language
    # And Hugging Face's class understands what is written.
    theirs = LlamaConfig(**llama.hf_config(language)).rope_parameters
    assert theirs == NEW


@pytest.mark.parametrize(
    "written",
    [
        {"rope_theta": 5.0},
        {"rope_theta": 5.0, "rope_scaling": None},
        {"rope_theta": 5.0, "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
        {"rope_theta": 5, "rope_parameters": {}, "partial_rotary_factor": 1},
        {"rope_theta": 5.0, "rope_scaling": {"type": "default"}},
    ],
)
def test_unscaled_positions_are_read_as_before(written):
    language = llama.language_config(SIZES | written)
    assert (language.rope_theta, language.rope_scaling) == (5.0, None)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            r"rope_scaling of .* has rope_type 'linear', .* only 'default' and 'llama3'",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type 'yarn'"),
        ({"rope_scaling": OLD | {"type": "linear"}}, "rope_type 'llama3' and type 'linear'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor, high"),
        ({"rope_scaling": OLD | {"factor": "8"}}, r'has factor "8", but it must be a number'),
        ({"rope_scaling": OLD | {"mscale": 1.0}}, r"has mscale, which rope_type 'llama3' does not"),
        ({"rope_parameters": {"factor": 2.0}}, r"has factor, which rope_type 'default' does not"),
        ({"rope_scaling": [8]}, r"has rope_scaling \[8\], but it must be an object"),
        ({"partial_rotary_factor": 0.5}, r"config\.json has partial_rotary_factor 0\.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, r"rope_parameters of .* has partial"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            r"by type of layer \(full_attention\)",
        ),
        (
            {"rope_scaling": OLD | {"factor": 4.0}, "rope_parameters": NEW},
            "rope_parameters and rope_scaling that contradict each other",
        ),
        ({"rope_scaling": {"type": "default"}, "rope_parameters": NEW}, "contradict each other"),
        ({"rope_theta": 1e4, "rope_parameters": NEW}, r"rope_theta 10000\.0 and 500000\.0 in two"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(written, message):
    with pytest.raises(CheckpointError, match=message):
        llama.language_config(SIZES | written)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factor": 0.0}, r"rope_scaling\.factor must be positive"),
        ({"low_freq_factor": 4.0}, r"low_freq_factor 4\.0 must be less than .*factor 4\.0"),
    ],
)
def test_scaling_that_cannot_be_computed_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        llama.language_config(SIZES | {"rope_scaling": OLD | changes})
