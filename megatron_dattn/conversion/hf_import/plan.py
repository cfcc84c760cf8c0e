"""Everything that can be known about an import before its first byte is written.

The source's configurations and headers are read (`source.py`, `vlm_source.py`), tokenizer and
image processor are tried, and the families' maps say which parameters come out. What comes back is
what the import will do; what is refused leaves no trace.
"""

import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from megatron_dattn.conversion.families.model_rules import added_rules
from megatron_dattn.conversion.hf_import.chat_template import TemplateChoice, choose_template
from megatron_dattn.conversion.hf_import.source import ImportSource, two_model_source
from megatron_dattn.conversion.hf_import.tokenizer import (
    begin_token,
    check_special_tokens,
    copy_tokenizer,
)
from megatron_dattn.conversion.hf_import.vlm_source import vlm_source
from megatron_dattn.conversion.io.output_folder import check_output, check_room
from megatron_dattn.data.image_settings import PROCESSOR_FILES, read_image_settings
from megatron_dattn.data.tokenizer import generation_ends, load_tokenizer
from megatron_dattn.errors import CheckpointError, ConfigError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Of stored weights, by the names that `execution.precision` has for them."""


@dataclass(frozen=True)
class ImportPlan:
    """An import that has been found possible."""

    source: ImportSource
    output: Path
    """Absolute."""
    dtype: str
    """One of `DTYPES`."""
    choice: TemplateChoice
    """In which the run folder's model is asked, unless the user says otherwise."""
    image_token_id: int
    """Of `<image>`; maybe one that the embedding does not have."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of the parameters to be written, by name."""
    initial: tuple[str, ...]
    """Parameters of the source's modules that it does not hold: they keep their initial values."""

    @property
    def template(self) -> str:
        """Its name."""
        return self.choice.name

    @property
    def num_parameters(self) -> dict[str, int]:
        """Per module."""
        counts = {module.name: 0 for module in self.source.modules}
        for name, shape in self.shapes.items():
            counts[name.partition(".")[0]] += prod(shape)
        return counts

    @property
    def num_bytes(self) -> int:
        """Of all parameters in the dtype in which they are stored."""
        return sum(map(prod, self.shapes.values())) * DTYPES[self.dtype].itemsize

    @property
    def num_rounded(self) -> dict[str, int]:
        """Number of the source's tensors that lose digits, by their dtype in safetensors' words."""
        counts: Counter[str] = Counter()
        stored = torch.finfo(DTYPES[self.dtype])
        for module in self.source.modules:
            for name in (name for rule in module.rules for name in rule.sources):
                if stored.eps > torch.finfo(module.weights.dtype(name)).eps:
                    counts[module.weights.dtypes[name]] += 1
        return dict(counts)

    def summary(self) -> str:
        """Describe for people what will be written."""
        lines = [f"{name}: {count:,} parameters" for name, count in self.num_parameters.items()]
        if self.initial:
            lines.append(f"not there, keep their initial values: {', '.join(self.initial)}")
        if self.num_rounded:
            counts = ", ".join(f"{count} of {dtype}" for dtype, count in self.num_rounded.items())
            remedy = "; --dtype fp32 keeps all their digits" if self.dtype == "bf16" else ""
            lines.append(f"tensors that are rounded to {self.dtype}: {counts}{remedy}")
        rows = self.source.model.language.vocab_size
        if self.image_token_id >= rows:
            lines.append(
                f"<image> has id {self.image_token_id}, behind the vocabulary of {rows}: it is "
                "never embedded, so nothing is grown; an export as LLaVA adds a row of zeros"
            )
        lines.append(f"conversations are written as {self.choice.name}: {self.choice.reason}")
        size = f"{self.num_bytes / 1e9:.2f} GB as {self.dtype}"
        lines.append(f"{self.output}: {len(self.shapes)} tensors, {size}")
        lines.append(
            f"generates and trains in {self.dtype} unless told another execution.precision"
        )
        return "\n".join(lines)


def plan_import(
    vision: Path,
    language: Path,
    output: Path,
    *,
    attention: str = "dattn",
    dtype: str = "bf16",
    origin: Path | None = None,
) -> ImportPlan:
    """Check the inputs, the output and the room for it; nothing is written.

    The arguments are those of `import_checkpoint`, but that `language` is always a folder, and
    `origin` the GGUF file that it was made of, if it was.

    Raises:
        CheckpointError: an input does not fit or is damaged, the output folder is not empty, or the
            disk is too small.
        ConfigError: sizes or a preset that do not fit each other.
    """
    output = check_output(output)
    return _plan(two_model_source(vision, language, attention, origin), output, dtype)


def plan_whole_import(
    folder: Path, output: Path, *, attention: str | None = None, dtype: str = "bf16"
) -> ImportPlan:
    """The same for one folder; the arguments are those of `import_whole_model`."""
    output = check_output(output)
    return _plan(vlm_source(folder, attention), output, dtype)


def _plan(source: ImportSource, output: Path, dtype: str) -> ImportPlan:
    template, image_token_id = _check_tokenizer(source)
    processor_files(source.image_processor)
    read_image_settings(source.image_processor, source.model.vision.image_size)
    shapes = {f"{m.name}.{rule.megatron}": rule.shape for m in source.modules for rule in m.rules}
    plan = ImportPlan(source, output, dtype, template, image_token_id, shapes, _initial(source))
    check_room(output, plan.num_bytes, "checkpoint")
    return plan


def processor_files(folder: Path) -> list[Path]:
    """The image processor's files in a folder; CheckpointError if there are none."""
    found = [folder / name for name in PROCESSOR_FILES if (folder / name).is_file()]
    if not found:
        raise CheckpointError(
            f"{folder / PROCESSOR_FILES[0]} is missing: it says how images are prepared"
        )
    return found


def _check_tokenizer(source: ImportSource) -> tuple[TemplateChoice, int]:
    """Try on a copy whether the tokenizer can be used with this model, and with which template.

    Returns:
        The template and the id of `<image>`.
    """
    language, begin = source.model.language, begin_token(source.special_tokens)
    with tempfile.TemporaryDirectory() as trial:
        try:
            image_id = copy_tokenizer(source.tokenizer, Path(trial), begin=begin)
            tokenizer = load_tokenizer(trial, template="model", vocab_size=language.vocab_size)
            generation_ends(trial, tokenizer)  # raises if it cannot be read
        except (CheckpointError, ConfigError) as error:
            raise CheckpointError(str(error).replace(trial, str(source.tokenizer))) from error
    if source.image_token_id not in (None, image_id):
        raise CheckpointError(
            f"{source.tokenizer}: config.json says that <image> has id {source.image_token_id}, in "
            f"the tokenizer it is {image_id}; they belong to different models"
        )
    check_special_tokens(source.special_tokens, tokenizer, source.tokenizer)
    choice = choose_template(source.tokenizer, tokenizer, language.family)
    if choice.name != "model" and tokenizer.bos_token is None:
        raise CheckpointError(
            f"{source.tokenizer}: neither tokenizer nor config.json names a token that begins a "
            f"text, which template '{choice.name}' writes; set bos_token in tokenizer_config.json"
        )
    return choice, image_id


def _initial(source: ImportSource) -> tuple[str, ...]:
    """Parameters of the source's modules that only a preset of ours has."""
    if source.has_added:
        return ()
    modules = {module.name for module in source.modules}
    added = {name: rules for name, rules in added_rules(source.model).items() if name in modules}
    return tuple(sorted(f"{name}.{rule.megatron}" for name in added for rule in added[name]))
