"""Which fields of two models may differ, by purpose, and what older checkpoints' facts meant."""

from dataclasses import asdict, replace
from typing import Any, get_args

import pytest

from megatron_dattn.errors import CheckpointError
from megatron_dattn.models.config import (
    AdapterConfig,
    AdapterNorm,
    LanguageConfig,
    ModelConfig,
    VisionConfig,
)
from megatron_dattn.models.model_identity import (
    Difference,
    Purpose,
    described,
    differences,
    require_same,
)

WHOLE = {"modules": ["vision_model", "adapter", "language_model"]}
FROM_ELSEWHERE = WHOLE | {"has_added": False}
TWO_HALVES = {"modules": ["vision_model", "language_model"], "has_added": False}


def _facts(attention: str = "dattn", **adapter: Any) -> dict[str, Any]:
    return {"model": asdict(ModelConfig(adapter=AdapterConfig(**adapter), attention=attention))}


def _changed(name: str, value: Any) -> dict[str, Any]:
    facts = _facts()
    section, _, field = name.rpartition(".")
    (facts["model"][section] if section else facts["model"])[field] = value
    return facts


def _forbidding(ours: dict[str, Any], stored: dict[str, Any]) -> set[str]:
    return {p for p in get_args(Purpose) if differences(ours, stored, p)}


ALL = set(get_args(Purpose))
WITH_RUN = {"resume", "start from", "answer with"}


@pytest.mark.parametrize(
    ("name", "value", "whole", "from_elsewhere", "two_halves"),
    [
        ("language.hidden_size", 1, ALL, ALL, ALL),
        ("language.rope_scaling", {"factor": 8.0}, ALL, ALL, ALL),
        ("language.max_position_embeddings", 1, set(), set(), set()),
        ("language.initializer_range", 1.0, WITH_RUN, WITH_RUN, WITH_RUN),
        ("vision.feature_layer", -1, WITH_RUN, WITH_RUN, WITH_RUN),
        ("adapter.text_scale", 1.0, set(), set(), set()),
        ("adapter.hidden_size", 1, ALL, ALL, ALL - {"start from"}),
        ("adapter.norm", "both", ALL, ALL, ALL - {"start from"}),
        ("adapter.norm_eps", 1.0, ALL, {"resume"}, {"resume"}),
        ("adapter.max_grid", 1, ALL, {"resume"}, {"resume"}),
        ("adapter.num_places", 1, ALL, {"resume"}, {"resume"}),
        ("adapter.visual_position", "per_patch", ALL, {"resume"}, {"resume"}),
        ("attention", "s_attn", ALL, {"resume"}, {"resume"}),
    ],
)
def test_purposes_that_forbid_a_difference(
    name: str, value: Any, whole: set[str], from_elsewhere: set[str], two_halves: set[str]
) -> None:
    ours, stored = _changed(name, value), _facts()
    assert _forbidding(ours, stored | WHOLE) == whole
    assert _forbidding(ours, stored | FROM_ELSEWHERE) == from_elsewhere
    assert _forbidding(ours, stored | TWO_HALVES) == two_halves


def test_a_field_is_not_freed_by_the_beginning_of_its_name() -> None:
    ours, stored = _facts(), _facts() | FROM_ELSEWHERE
    ours["model"]["attention_scale"] = 2.0
    assert differences(ours, stored, "start from")


def test_other_facts_are_compared_if_asked_for_and_never_free() -> None:
    ours = {"tokenizer": "aa", "adapter": {"norm_eps": 1}}
    stored = {"tokenizer": "bb", "adapter": {"norm_eps": 2}, "stage": "s"} | FROM_ELSEWHERE
    for purpose in get_args(Purpose):
        names = [field.name for field in differences(ours, stored, purpose)]
        assert names == ["adapter.norm_eps", "tokenizer"]


def test_differences_are_listed_by_field_with_both_values() -> None:
    ours = {"model": {"width": 64, "depth": 2, "new": None}, "tokenizer": "aa"}
    stored = {"model": {"width": 32, "depth": 2, "old": 1}, "tokenizer": "bb", "stage": "s"}
    assert differences(ours, stored, "resume") == [
        Difference("model.new", "None", "nothing"),
        Difference("model.old", "nothing", "1"),
        Difference("model.width", "64", "32"),
        Difference("tokenizer", "'aa'", "'bb'"),
    ]


def test_facts_are_compared_as_json() -> None:
    assert not differences({"grid": (2, 2)}, {"grid": [2, 2]}, "resume")
    assert not differences({"rate": 1e-3}, {"rate": 0.001}, "resume")


@pytest.mark.parametrize(
    ("purpose", "line"),
    [
        ("resume", "X is not Y: tokenizer: this run has 'a', the checkpoint 'b'; do Z"),
        ("compare with", "X is not Y: tokenizer: the checkpoint has 'a', the folder 'b'; do Z"),
    ],
)
def test_an_error_names_field_values_and_remedy(purpose: Purpose, line: str) -> None:
    ours = {"tokenizer": "a"}
    with pytest.raises(CheckpointError) as error:
        require_same(ours, {"tokenizer": "b"}, purpose, complaint="X is not Y", remedy="do Z")
    assert str(error.value) == line
    require_same(ours, ours, purpose, complaint="", remedy="")


@pytest.mark.parametrize(
    ("attention", "older", "norm"),
    [("dattn", True, "before"), ("s_attn", False, "none"), ("vidi", True, "before")],
)
def test_facts_from_before_the_norms_place_say_what_they_meant(
    attention: str, older: bool, norm: AdapterNorm
) -> None:
    """Facts as they were written then: no place, no kind of positions, another text_scale."""
    then = _facts(attention) | WHOLE
    adapter = {"input_norm": older, "hidden_size": None, "norm_eps": 1e-5, "max_grid": 64}
    then["model"]["adapter"] = {**adapter, "text_scale": 0.02}
    del then["model"]["language"]["rope_scaling"]
    assert not differences(_facts(attention, norm=norm), then, "resume")
    other = differences(_facts(attention, norm="both"), then, "resume")
    assert other == [Difference("model.adapter.norm", "'both'", f"'{norm}'")]


def test_a_norm_left_to_the_preset_is_the_norm_by_name() -> None:
    for attention, norm in (("vidi", "behind"), ("dattn", "before"), ("s_attn", "before")):
        left, named = (_facts(attention), _facts(attention, norm=norm))
        assert not differences(left, named | WHOLE, "resume")
        assert not differences(named, left | WHOLE, "resume")


def test_descriptions_of_models_that_compute_the_same_are_equal() -> None:
    left = ModelConfig(vision=VisionConfig(num_hidden_layers=27, feature_layer=-2))
    said = ModelConfig(
        vision=VisionConfig(num_hidden_layers=26, feature_layer=-1),
        adapter=AdapterConfig(norm="before", hidden_size=4096, num_places=27),
        language=LanguageConfig(initializer_range=1.0, max_position_embeddings=9),
    )
    assert not differences(described(left), described(said) | WHOLE, "compare with")
    fewer = replace(said, vision=replace(said.vision, feature_layer=-2))
    (field,) = differences(described(left), described(fewer) | WHOLE, "compare with")
    assert field == Difference("model.vision.num_used_layers", "26", "25")
