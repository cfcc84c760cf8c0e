"""README.md of an export: what the model is, what it was trained on, and how to ask it."""

from pathlib import Path
from typing import Any

import yaml

from megatron_dattn.conversion.families.exportable import is_llava
from megatron_dattn.conversion.hf_export.config import OLDEST_STOCK
from megatron_dattn.conversion.hf_export.metrics import Metrics
from megatron_dattn.hf.versions_dattn import NEWEST_TESTED, OLDEST_TESTED, OVERRIDE
from megatron_dattn.models.config import ModelConfig

_NAMES = {
    "siglip": "SigLIP",
    "clip": "CLIP",
    "mistral": "Mistral",
    "llama": "Llama",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma2": "Gemma-2",
}
_DATTN_USAGE = f"""\
```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
messages = [{{"role": "user", "content": [
    {{"type": "image", "path": "picture.jpg"}}, {{"type": "text", "text": "What is this?"}}]}}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(tokens[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

`trust_remote_code=True` runs the Python files of this folder, which need Pillow. They were tested
with transformers {OLDEST_TESTED} to {NEWEST_TESTED} and refuse any older or newer one, because a
change there can spoil answers without an error; `{OVERRIDE}=1` in the
environment lets them try.
"""
_LLAVA_USAGE = f"""\
```python
from transformers import AutoImageProcessor, AutoProcessor, LlavaForConditionalGeneration

model = LlavaForConditionalGeneration.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)
processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
```

The last line matters where torchvision is installed: transformers would resize images with it, and
its pixels differ a little from those of training, which Pillow resized. Tested with transformers
{OLDEST_STOCK} to {NEWEST_TESTED}.
"""


def model_card(
    model: ModelConfig,
    *,
    title: str,
    facts: dict[str, Any],
    metrics: Metrics,
    license_name: str | None,
) -> str:
    """The card's text.

    Args:
        facts: of the checkpoint's manifest.
        metrics: of an evaluation, see `metrics.py`.
        license_name: as the hub spells it; the card says that it is missing where None.
    """
    front = {
        "license": license_name or "unknown",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["vision-language", "decomposed-attention"],
    }
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False).strip(),
            "---",
            f"# {title}",
            "",
            _description(model),
            "",
            "## Training",
            *_training(facts),
            "",
            "## Metrics",
            *(_metrics(facts, metrics) or ["None recorded."]),
            "",
            "## License",
            license_name or "Not stated. Fill in the field `license` above before publishing.",
            "",
            "## Use",
            _LLAVA_USAGE if is_llava(model) else _DATTN_USAGE,
        ]
    )


def _description(model: ModelConfig) -> str:
    vision, language = model.vision, model.language
    reprojects = model.preset.visual.source == "reproject"
    between = "a projector in every layer" if reprojects else "an adapter"
    return (
        f"A vision-language model: a {_NAMES[vision.family]} encoder ({vision.num_used_layers} "
        f"layers of width {vision.hidden_size}, images of {vision.image_size} pixels, "
        f"{model.tokens_per_image} visual tokens each), {between}, and a {_NAMES[language.family]} "
        f"decoder ({language.num_hidden_layers} layers of width {language.hidden_size}). Its "
        f"attention over images and text is the preset `{model.attention}` of megatron_dattn."
    )


def _training(facts: dict[str, Any]) -> list[str]:
    """One line for every stage, from the last one back to the import that all began with."""
    progress = facts.get("progress") or {}
    lines = [
        f"- {_stage(facts)}",
        *(
            f"  - {name.replace('_', ' ')}: {value:,}"
            for name, value in progress.items()
            if value and name != "step"
        ),
    ]
    while facts := facts.get("parent") or {}:
        lines.append(f"- before that: {_stage(facts)}")
    return lines


def _stage(facts: dict[str, Any]) -> str:
    """Names only: the folders are nobody's business where the card is read."""
    if sources := facts.get("sources"):
        names = (f"{Path(path).name} ({module})" for module, path in sources.items())
        return f"import of {', '.join(names)}"
    data_sets = ", ".join(facts.get("data_sets") or []) or "data that was not recorded"
    stage, step = facts.get("stage", "unknown stage"), facts.get("step", "unknown")
    return f"{stage}, step {step}, on {data_sets}"


def _metrics(facts: dict[str, Any], metrics: Metrics) -> list[str]:
    """The last validation loss, and what an evaluation found."""
    lines = [f"- {name}: {value:g}" for name, value in metrics.items()]
    if validation := facts.get("validation"):
        loss = f"- validation loss at step {validation['step']}: {validation['loss']:.4f}"
        return [loss, *lines]
    return lines
