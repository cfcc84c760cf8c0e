"""Questions about images, put to an exported model and to the engine's own generator.

Both answer from pixels or from what they kept of an encoding, which is all that
`bench_image_cache.py` asks of them. Questions are random tokens; weights are a checkpoint's, or
random where only time matters.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    SiglipVisionConfig,
)

from benchmarks.random_checkpoint import mistral_json, siglip_json
from megatron_dattn.batch import IGNORED_LABEL
from megatron_dattn.data.images import ImagePreprocessor
from megatron_dattn.data.template import TextTokens
from megatron_dattn.hf.configuration_dattn import DAttnConfig
from megatron_dattn.hf.modeling_dattn import DAttnForConditionalGeneration
from megatron_dattn.inference import LoadedModel, Prompt, encode_images, generate_tokens
from megatron_dattn.inference.decoding import Decoding
from megatron_dattn.inference.prompt import pack_prompts
from megatron_dattn.models.build import build_model
from megatron_dattn.models.config import LanguageConfig, ModelConfig, VisionConfig
from megatron_dattn.models.execution import ExecutionConfig
from megatron_dattn.parallel.config import ParallelConfig

IMAGE_TOKEN = 10
_FIRST_WORD = 16  # ids before it are control tokens'


@dataclass(frozen=True)
class Questions:
    """What is asked: every question about all images, which stand in front of it."""

    number: int
    images: int
    text_tokens: int
    answer_tokens: int

    def tokens(self, vocab_size: int) -> list[list[int]]:
        """Token ids of the questions, the same at every call."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.number, self.text_tokens)
        return torch.randint(_FIRST_WORD, vocab_size, shape, generator=generator).tolist()

    def pictures(self, side: int) -> list[np.ndarray]:
        """Random images, uint8 [side, side, 3]."""
        shape = (self.images, side, side, 3)
        return list(np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8))


class Generator(Protocol):
    """One that can keep images. `kept` is what `encode` gave; None stands for the pixels."""

    name: str
    description: str

    def encode(self) -> Any:
        """Encode the questions' images, once for all."""

    def answer(self, question: int, tokens: int, kept: Any = None) -> list[int]:
        """Token ids of an answer."""

    def logits(self, question: int, kept: Any = None) -> Tensor:
        """Of the first token, fp32 [vocab_size] on the CPU."""


class ExportedModel:
    """`megatron_dattn/hf`, as transformers runs it."""

    name = "exported model"

    def __init__(self, model: Any, questions: Questions) -> None:
        config: DAttnConfig = model.config
        self._model = model
        marks = [config.image_token_id] * questions.images
        ids = questions.tokens(config.text_config.vocab_size)
        self._prompts = [torch.tensor([marks + text], device=model.device) for text in ids]
        pictures = questions.pictures(config.vision_config.image_size)
        pixels = ImagePreprocessor(config.vision_config.image_size).normalise(pictures)
        self._pixels = pixels.to(model.device, model.dtype)
        tokens = questions.images * config.tokens_per_image
        self.description = _describe(self.name, tokens, model.device, model.dtype)

    def encode(self) -> Any:
        return self._model.encode_images(self._pixels)

    def answer(self, question: int, tokens: int, kept: Any = None) -> list[int]:
        prompt = self._prompts[question]
        said = self._model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            suppress_tokens=[IMAGE_TOKEN],
            **self._images(kept),
        )
        return said[0, prompt.shape[1] :].tolist()

    @torch.inference_mode()
    def logits(self, question: int, kept: Any = None) -> Tensor:
        """Of the answer's first token, fp32 [vocabulary], on the CPU."""
        outputs = self._model(self._prompts[question], logits_to_keep=1, **self._images(kept))
        return outputs.logits[0, -1].float().cpu()

    def _images(self, kept: Any) -> dict[str, Any]:
        return {"pixel_values": self._pixels} if kept is None else {"image_cache": kept}


class OwnGenerator:
    """`megatron_dattn/inference`."""

    name = "own generator"

    def __init__(self, loaded: LoadedModel, questions: Questions) -> None:
        model = loaded.model
        self._loaded = loaded
        self._texts = questions.tokens(model.model_config.language.vocab_size)
        self._pictures = questions.pictures(model.model_config.vision.image_size)
        weight = next(model.parameters())
        tokens = questions.images * model.model_config.tokens_per_image
        self.description = _describe(self.name, tokens, weight.device, weight.dtype)

    def encode(self) -> Any:
        return encode_images(self._loaded, self._pictures)

    def answer(self, question: int, tokens: int, kept: Any = None) -> list[int]:
        prompt = self._prompt(question, kept)
        return generate_tokens(self._loaded, [prompt], max_new_tokens=tokens)[0]

    @torch.inference_mode()
    def logits(self, question: int, kept: Any = None) -> Tensor:
        """The same, fp32 [vocabulary]; from pixels by training's forward pass, which keeps none."""
        prompt = self._prompt(question, kept)
        if kept is None:
            batch = pack_prompts(self._loaded, [(prompt, [])])
            last = torch.tensor([batch.layout.num_tokens - 1], device=batch.input_ids.device)
            logits = self._loaded.model.forward_logits(batch, last)
        else:
            logits = Decoding(self._loaded, [prompt]).prefill()
        return logits[0].float().cpu()

    def _prompt(self, question: int, kept: Any) -> Prompt:
        ids, images = self._texts[question], tuple(self._pictures if kept is None else kept)
        return Prompt(TextTokens(ids, [IGNORED_LABEL] * len(ids), (0,) * len(images)), images)


def sizes(hidden_size: int, layers: int) -> ModelConfig:
    """A model of Mistral's and SigLIP's proportions; an image of 384 pixels has 729 tokens."""
    language = LanguageConfig(
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=max(1, hidden_size // 256),
        head_dim=64,
        intermediate_size=hidden_size * 7 // 2,
        vocab_size=4096,
    )
    vision = VisionConfig(
        hidden_size=384,
        num_hidden_layers=max(2, layers),
        num_attention_heads=6,
        intermediate_size=1536,
    )
    return ModelConfig(vision=vision, language=language, attention="dattn")


def random_export(model: ModelConfig) -> Any:
    """Random fp32 weights in the exported code."""
    config = DAttnConfig(
        vision_config=siglip_json(model.vision),
        text_config=mistral_json(model.language),
        image_token_id=IMAGE_TOKEN,
        adapter_hidden_size=model.language.hidden_size,
    )
    return DAttnForConditionalGeneration(config).eval()


def random_llava(model: ModelConfig) -> Any:
    """The same sizes as a stock LLaVA, which counts a token for each patch."""
    vision: dict[str, Any] = siglip_json(model.vision)
    language: dict[str, Any] = mistral_json(model.language)
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(**vision),
        text_config=MistralConfig(**language),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=model.tokens_per_image,
        vision_feature_layer=model.vision.feature_layer,
        vision_feature_select_strategy="full",
    )
    return LlavaForConditionalGeneration(config).eval()


def random_loaded(model: ModelConfig) -> LoadedModel:
    """Random fp32 weights in the engine, and no end token: answers end at their limit."""
    built = build_model(
        model, ParallelConfig(), ExecutionConfig(precision="fp32", transformer_impl="local")
    )
    tokenizer: Any = SimpleNamespace(
        eos_token_id=-1, convert_tokens_to_ids=lambda token: IMAGE_TOKEN
    )
    conversations: Any = SimpleNamespace(template="mistral_v3", end_token=None)
    preprocessor = ImagePreprocessor(model.vision.image_size)
    return LoadedModel(tokenizer, conversations, preprocessor, cast(Any, None), built.eval())


def _describe(name: str, tokens: int, device: torch.device, dtype: torch.dtype) -> str:
    return f"{name}: {tokens} visual tokens, {device.type}, {str(dtype).removeprefix('torch.')}"
