"""Names and layouts of the exported tensors: the import's rules with the model's own prefixes.

The adapter and what a preset adds to the language model have no original elsewhere; their names in
Hugging Face's terms are fixed here and in megatron_dattn/hf.
"""

from dataclasses import replace

from megatron_dattn.attention import get_preset
from megatron_dattn.conversion import families
from megatron_dattn.conversion.weight_map import Rule
from megatron_dattn.models.config import ModelConfig


def export_rules(model: ModelConfig) -> list[Rule]:
    """Rules for every parameter of the model, both sides with full names."""
    vision = [
        _prefixed(rule, "vision_model.", "model.vision_tower.")
        for rule in families.vision_rules(model.vision)
    ]
    language = [
        replace(
            rule,
            megatron=f"language_model.{rule.megatron}",
            sources={_language_name(name): shape for name, shape in rule.sources.items()},
        )
        for rule in families.language_rules(model.language)
    ]
    adapter = [
        _prefixed(rule, "adapter.", "model.multi_modal_projector.") for rule in adapter_rules(model)
    ]
    return vision + adapter + language + _gate_rules(model)


def has_input_norm(model: ModelConfig) -> bool:
    """Whether the adapter normalizes the encoder's features."""
    return model.adapter.input_norm


def adapter_rules(model: ModelConfig) -> list[Rule]:
    """Rules for every parameter of the adapter."""
    features, hidden = model.vision.hidden_size, model.language.hidden_size
    middle = model.adapter.hidden_size or hidden
    shapes: dict[str, tuple[int, ...]] = {}
    if has_input_norm(model):
        shapes["norm.weight"] = (features,)
    shapes |= {
        "linear_fc1.weight": (middle, features),
        "linear_fc1.bias": (middle,),
        "linear_fc2.weight": (hidden, middle),
        "linear_fc2.bias": (hidden,),
    }
    embedding = get_preset(model.attention).positions.embedding
    if embedding == "row_column":
        table = (model.adapter.max_grid, hidden)
        shapes |= {"positions.rows": table, "positions.columns": table}
    elif embedding == "fractional":
        shapes |= _fractional_shapes(hidden)
    return [
        Rule(name, {name.replace("linear_fc", "linear_"): shape}) for name, shape in shapes.items()
    ]


def _fractional_shapes(hidden: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for mlp in ("rows", "columns"):
        for layer in (0, 2):
            shapes[f"positions.{mlp}.{layer}.weight"] = (hidden, hidden)
            shapes[f"positions.{mlp}.{layer}.bias"] = (hidden,)
    for norm in ("row_norm", "column_norm", "input_norm", "output_norm"):
        shapes[f"positions.{norm}.weight"] = (hidden,)
    return shapes


def _gate_rules(model: ModelConfig) -> list[Rule]:
    if not get_preset(model.attention).has_gate:
        return []
    return [
        Rule(
            f"language_model.decoder.layers.{layer}.self_attention.gate",
            {
                f"model.language_model.layers.{layer}.self_attn.gate": (
                    model.language.num_attention_heads,
                )
            },
        )
        for layer in range(model.language.num_hidden_layers)
    ]


def _prefixed(rule: Rule, ours: str, theirs: str) -> Rule:
    sources = {theirs + name: shape for name, shape in rule.sources.items()}
    return replace(rule, megatron=ours + rule.megatron, sources=sources)


def _language_name(name: str) -> str:
    """`model.layers...` of a language model alone, inside a model that has it as a part."""
    bare = name.removeprefix("model.")
    return name if bare == name else f"model.language_model.{bare}"
