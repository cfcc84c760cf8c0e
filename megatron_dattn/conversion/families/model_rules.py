"""Rules of the whole model: those of its families with the prefixes of both sides.

The adapter and what a preset adds to the language model have no original elsewhere; their names in
Hugging Face's terms are fixed here and in megatron_dattn/hf.
"""

from megatron_dattn.conversion.families import registry
from megatron_dattn.conversion.families.exportable import is_llava
from megatron_dattn.conversion.families.key_names import DEEPER_ENCODER, KeyNames
from megatron_dattn.conversion.families.weight_map import (
    GroupedKV,
    Rule,
    below,
    renamed,
    with_more_rows,
)
from megatron_dattn.models.config import AdapterNorm, LanguageConfig, ModelConfig

LLAVA_NAMES = KeyNames(vision_module=DEEPER_ENCODER)
"""transformers 4 knows a LLaVA's encoder by these names alone; 5 reads them too."""


def export_rules(model: ModelConfig, image_rows: int = 0) -> list[Rule]:
    """Rules for every parameter of the model, both sides with full names.

    Args:
        image_rows: as of `exportable.image_rows`.
    """
    rules = [
        rule
        for module, rules in rules_by_module(model).items()
        for rule in renamed(rules, megatron=below(f"{module}."))
    ]
    return with_more_rows(rules, image_rows)


def rules_by_module(model: ModelConfig) -> dict[str, list[Rule]]:
    """The same by module, whose name our parameters' names go without.

    A preset may have no adapter; the module is then complete without a parameter.
    """
    keys = LLAVA_NAMES if is_llava(model) else KeyNames()
    added = added_rules(model)
    # Where every layer has a projector of its own there is no adapter.
    reprojects = model.preset.visual.source == "reproject"
    adapter = [] if reprojects else [*projector_rules(model), *added["adapter"]]
    language = [*registry.language_rules(model.language), *added["language_model"]]
    return {
        "vision_model": renamed(registry.vision_rules(model.vision), keys.vision),
        "adapter": renamed(adapter, keys.projector),
        "language_model": renamed(language, keys.language),
    }


def added_rules(model: ModelConfig) -> dict[str, list[Rule]]:
    """Rules for what the preset adds to a plain model, by module; models from elsewhere lack it.

    Their names on both sides go without prefix, as the module's own rules.
    """
    return {"adapter": _position_rules(model), "language_model": _layer_rules(model)}


def _position_rules(model: ModelConfig) -> list[Rule]:
    hidden = model.language.hidden_size
    if model.preset.visual.source == "reproject":
        return []
    positions: dict[str, tuple[int, ...]] = {}
    match model.visual_embedding:
        case "row_column":
            table = (model.adapter.max_grid, hidden)
            positions = {"positions.rows": table, "positions.columns": table}
        case "per_patch":
            positions = {"positions.patches": (model.num_places**2, hidden)}
        case "fractional":
            positions = _fractional_shapes(hidden)
    return _renamed_linears(positions)


def projector_rules(model: ModelConfig) -> list[Rule]:
    """Rules for the adapter without positions: LLaVA's projector, and the norms that the model has
    around it."""
    middle = model.adapter.hidden_size or model.language.hidden_size
    return _renamed_linears(_mlp_shapes(model, middle, model.adapter_norm))


def _mlp_shapes(model: ModelConfig, middle: int, norm: AdapterNorm) -> dict[str, tuple[int, ...]]:
    """Of the MLP from the encoder's width to the language model's, and its norms."""
    features, hidden = model.vision.hidden_size, model.language.hidden_size
    norms: dict[str, tuple[int, ...]] = {}
    if norm in ("before", "both"):
        norms["norm.weight"] = (features,)
    if norm in ("behind", "both"):
        norms["output_norm.weight"] = (hidden,)
    return norms | {
        "linear_fc1.weight": (middle, features),
        "linear_fc1.bias": (middle,),
        "linear_fc2.weight": (hidden, middle),
        "linear_fc2.bias": (hidden,),
    }


def _renamed_linears(shapes: dict[str, tuple[int, ...]]) -> list[Rule]:
    return [
        Rule(name, {name.replace("linear_fc", "linear_"): shape}) for name, shape in shapes.items()
    ]


def _fractional_shapes(hidden: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for mlp in ("rows", "columns"):
        for layer in (0, 2):
            shapes[f"positions.{mlp}.{layer}.weight"] = (hidden, hidden)
            shapes[f"positions.{mlp}.{layer}.bias"] = (hidden,)
    return shapes | {"positions.last_norm.weight": (hidden,)}


def _layer_rules(model: ModelConfig) -> list[Rule]:
    preset = model.preset
    rules: list[Rule] = []
    if preset.has_gate:
        heads = (model.language.num_attention_heads,)
        rules.append(Rule("self_attention.gate", {"self_attn.gate": heads}))
    if preset.merge == "cascade":
        rules += _cross_attention_rules(model.language)
    if preset.visual.source == "reproject":
        shapes = _mlp_shapes(model, model.language.hidden_size, "before")
        projector = below("visual_projector.")
        rules += renamed(_renamed_linears(shapes), projector, megatron=projector)
    return [
        rule
        for layer in range(model.language.num_hidden_layers)
        for rule in renamed(
            rules, below(f"model.layers.{layer}."), megatron=below(f"decoder.layers.{layer}.")
        )
    ]


def _cross_attention_rules(language: LanguageConfig) -> list[Rule]:
    hidden = language.hidden_size
    queries = language.num_attention_heads * language.head_dim
    keys = language.num_key_value_heads * language.head_dim
    ours, theirs = "cross_attention.linear_", "cross_attn."
    return [
        Rule(f"{ours}q.weight", {f"{theirs}q_proj.weight": (queries, hidden)}),
        Rule(
            f"{ours}kv.weight",
            {f"{theirs}{name}_proj.weight": (keys, hidden) for name in "kv"},
            GroupedKV(language.num_key_value_heads),
        ),
        Rule(f"{ours}proj.weight", {f"{theirs}o_proj.weight": (hidden, queries)}),
    ]
