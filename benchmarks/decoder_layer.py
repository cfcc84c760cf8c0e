"""One decoder layer of the engine, ready to be timed: a variant's name in, a step out.

The layer is a `DAttnLanguageModel` of one layer without embedding, final norm and head, so what is
measured is the module that training runs. It stands for the first layer of a decoder whose second
one reads its tokens: the saving of unread tokens, which concerns the last layer, is off.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import psutil
import torch
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from benchmarks.eager import EagerCore
from benchmarks.exact_attention import ExactBackend
from benchmarks.roofline import MIDDLE_LAYER, NAIVE, LayerRun
from megatron_dattn.attention import get_preset
from megatron_dattn.attention.backends.base import Backend
from megatron_dattn.attention.backends.select import BACKENDS, select_backend
from megatron_dattn.attention.layers import LayerRule, layer_rules
from megatron_dattn.attention.layout import ImageSpan, TokenLayout
from megatron_dattn.errors import ConfigError
from megatron_dattn.models.attention_inputs import AttentionInputs, prepare_attention
from megatron_dattn.models.config import LanguageConfig
from megatron_dattn.models.execution import BackendName, ExactSavings, ExecutionConfig
from megatron_dattn.models.language_model import DAttnLanguageModel
from megatron_dattn.models.layer_specs import Implementation, resolve_implementation
from megatron_dattn.models.transformer_config import language_transformer_config
from megatron_dattn.parallel.config import ParallelConfig
from megatron_dattn.parallel.sequence import SequenceLayout
from megatron_dattn.planner.layer_sizes import LayerSizes
from megatron_dattn.runtime.distributed import seed_everything

GB = 1e9
# What eager attention holds of the scores at once, in the run's dtype; its softmax is fp32. The
# peak at 8192 tokens in memory_cpu.md is that of 6.2 copies.
_EAGER_COPIES = 7
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TEXT_BEFORE_IMAGE = 32
_SEED = 1234
_DEPTH = 4


@dataclass(frozen=True)
class Variant:
    """What is timed: a preset and how it is run. Written `preset[:option]...`.

    Options: `naive` without exact savings, `eager` with the scores in memory (s_attn alone),
    `recompute` in full, `chunk=TOKENS` of the FFN, `backend=NAME` in place of the common one.
    """

    name: str
    preset: str
    savings: ExactSavings
    eager: bool
    recompute: bool
    backend: str | None = None
    """None for that of the whole benchmark."""

    @staticmethod
    def parse(text: str) -> "Variant":
        """Raises ConfigError for unknown presets and options."""
        preset, *options = text.split(":")
        get_preset(preset)
        chunk, backend = 0, None
        for option in options:
            name, _, value = option.partition("=")
            if name == "chunk" and value.isdecimal():
                chunk = int(value)
            elif name == "backend" and value in ("auto", *BACKENDS):
                backend = value
            elif option not in ("naive", "eager", "recompute"):
                raise ConfigError(
                    f"variant '{text}' has the unknown option '{option}'; choose naive, eager, "
                    f"recompute, chunk=TOKENS or backend=NAME with auto, {', '.join(BACKENDS)}"
                )
        if "eager" in options and preset != "s_attn":
            raise ConfigError(f"variant '{text}': eager attention is written for s_attn alone")
        if "eager" in options and backend is not None:
            raise ConfigError(f"variant '{text}': eager attention has no backend; leave one out")
        savings = NAIVE if "naive" in options else MIDDLE_LAYER
        savings = dataclasses.replace(savings, ffn_chunk_tokens=chunk)
        return Variant(text, preset, savings, "eager" in options, "recompute" in options, backend)


@dataclass(frozen=True)
class Bench:
    """The sizes and the precision that all variants share."""

    sizes: LayerSizes
    device: torch.device
    precision: str = "bf16"
    backend: str = "auto"

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    def describe(self, text: int) -> str:
        """Sizes for a report's header."""
        sizes = self.sizes
        return (
            f"{self.precision}, backend {self.backend}; hidden {sizes.hidden_size}, "
            f"{sizes.num_attention_heads} query and {sizes.num_key_value_heads} key heads of "
            f"{sizes.head_dim}, FFN {sizes.intermediate_size}, encoder's features "
            f"{sizes.vision_hidden_size}; {text} text tokens"
        )

    def run_of(self, variant: Variant, layout: TokenLayout) -> LayerRun:
        """It as the roofline counts it."""
        rule, size = rules_of(variant.preset)[0], self.dtype.itemsize
        return LayerRun(
            layout, rule, self.sizes, size, variant.savings, variant.eager, variant.recompute
        )

    def check(self, variants: Sequence[Variant]) -> None:
        """Raises ConfigError for a variant that these sizes cannot run."""
        sizes = self.sizes
        for variant in variants:
            reprojects = get_preset(variant.preset).visual.source == "reproject"
            if reprojects and sizes.vision_hidden_size > sizes.hidden_size:
                raise ConfigError(
                    f"variant '{variant.name}' carries features of --vision-size "
                    f"{sizes.vision_hidden_size} in tokens of --hidden-size {sizes.hidden_size}; "
                    "make the one smaller or the other larger"
                )


def rules_of(preset: str) -> tuple[LayerRule, ...]:
    """The rules of a decoder whose first layer is the one that is built.

    Four layers deep: also where images leave after half of the layers, the second one reads what
    the first gives.
    """
    return layer_rules(get_preset(preset), _DEPTH, skip_unread=False)


def one_sample(visual: int, text: int) -> TokenLayout:
    """One image after the first text tokens, as square as its patches allow; nothing is padded."""
    if visual < 1 or text < 1:
        raise ConfigError(f"{visual} visual and {text} text tokens; both must be positive")
    height = next(side for side in range(math.isqrt(visual), 0, -1) if visual % side == 0)
    before = min(TEXT_BEFORE_IMAGE, text)
    image = ImageSpan(0, before, (height, visual // height))
    return TokenLayout((text,), (image,), visual, text, prompt_lengths=(before,))


def fits(bench: Bench, variant: Variant, tokens: int, left_out: list[str]) -> bool:
    """True if eager attention's scores fit into memory; what does not is noted in `left_out`."""
    if not variant.eager:
        return True
    scores = bench.sizes.num_attention_heads * tokens**2 * bench.dtype.itemsize
    if bench.device.type == "cuda":
        free = torch.cuda.mem_get_info(bench.device)[0]
    else:
        free = psutil.virtual_memory().available
    if _EAGER_COPIES * scores < free:
        return True
    needed, free_gb = _EAGER_COPIES * scores / GB, free / GB
    left_out.append(
        f"{variant.name} over {tokens} tokens left out: about {needed:.0f} GB of scores, "
        f"{free_gb:.0f} GB free"
    )
    return False


class LayerBench:
    """One layer with random weights, an input and a gradient of its output.

    Layers of one `Bench` and preset have equal weights and inputs. megatron-core's groups must
    exist. `double` builds the same in float64 over attention as it is defined: the reference.
    """

    def __init__(
        self, bench: Bench, variant: Variant, layout: TokenLayout, *, double: bool = False
    ) -> None:
        self.bench, self.variant, self.layout = bench, variant, layout
        self.dtype = torch.float64 if double else bench.dtype
        implementation = resolve_implementation(
            ExecutionConfig(transformer_impl="local" if double else "auto")
        )
        self.model = self._build(implementation).to(self.dtype)
        self.attention = self._attention_inputs(double)
        self.tokens, self.gradient = (tensor.to(self.dtype) for tensor in self._draw())
        self.tokens.requires_grad_()

    def step(self) -> Tensor:
        """Forward and backward; returns the output [S, 1, H] in the layer's dtype.

        Gradients of the step before are dropped.
        """
        self.drop_gradients()
        self.model.set_input_tensor(self.tokens)
        out = self.model(None, self.attention)
        out.backward(self.gradient)
        return out.detach()

    def drop_gradients(self) -> None:
        """Free what the last step left."""
        self.tokens.grad = None
        self.model.zero_grad(set_to_none=True)

    def _build(self, implementation: Implementation) -> DAttnLanguageModel:
        sizes, variant = self.bench.sizes, self.variant
        language = LanguageConfig(
            hidden_size=sizes.hidden_size,
            num_hidden_layers=1,
            num_attention_heads=sizes.num_attention_heads,
            num_key_value_heads=sizes.num_key_value_heads,
            head_dim=sizes.head_dim,
            intermediate_size=sizes.intermediate_size,
            # Wide enough for scores to differ: a nearly uniform attention would hide mistakes.
            initializer_range=sizes.hidden_size**-0.5,
        )
        execution = ExecutionConfig(
            precision="bf16" if self.bench.precision == "bf16" else "fp32",
            recompute="full" if variant.recompute else "none",
            attention_backend=cast(BackendName, variant.backend or self.bench.backend),
            savings=variant.savings,
        )
        config: TransformerConfig = language_transformer_config(
            language, ParallelConfig(), execution
        )
        seed_everything(_SEED)
        model = DAttnLanguageModel(
            config,
            language,
            implementation,
            preset=get_preset(variant.preset),
            savings=variant.savings,
            feature_size=sizes.vision_hidden_size,
            pre_process=False,
            post_process=False,
        )
        model.to(self.bench.device)
        if variant.eager:
            attention = model.decoder.layers[0].self_attention
            attention.core_attention = EagerCore(
                self.layout, self.bench.device, self.dtype, sizes.head_dim**-0.5
            )
        return model.train()

    def _backend(self) -> Backend:
        name = self.variant.backend or self.bench.backend
        return select_backend(name, self.bench.device, self.dtype, self.bench.sizes.head_dim)

    def _attention_inputs(self, double: bool) -> AttentionInputs:
        device, preset, layout = self.bench.device, get_preset(self.variant.preset), self.layout
        head_dim = self.bench.sizes.head_dim
        shards = SequenceLayout(
            layout.visual_budget,
            layout.text_budget,
            get_tensor_model_parallel_group(),
            sequence_parallel=False,
        )
        return prepare_attention(
            layout,
            preset,
            rules_of(self.variant.preset),
            shards,
            ExactBackend() if double else self._backend(),
            language=LanguageConfig(head_dim=head_dim),
            device=device,
        )

    def _draw(self) -> tuple[Tensor, Tensor]:
        """Tokens and gradient, [S, 1, H] of the run's dtype."""
        generator = torch.Generator().manual_seed(_SEED)
        shape = (self.layout.num_tokens, 1, self.bench.sizes.hidden_size)
        drawn = (torch.randn(shape, generator=generator) for _ in range(2))
        tokens, gradient = (x.to(self.bench.device, self.bench.dtype) for x in drawn)
        return tokens, gradient
