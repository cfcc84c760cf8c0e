"""What a cached image saves: time to the first token with and without it.

    python -m benchmarks.bench_image_cache --model model/ --questions 8

Runs an exported model on one device. Every question about the same image is asked twice: with its
pixels, and with the keys and values that `encode_images` left. The answers must be equal.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dattn.hf.configuration_dattn import DAttnConfig
from megatron_dattn.hf.modeling_dattn import DAttnForConditionalGeneration


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, required=True, help="folder of an export")
    parser.add_argument("--images", type=int, default=1, help="images of the prompt")
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--text-tokens", type=int, default=64, help="length of a question")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def timed(function: Callable[..., Any], *values: Any, **options: Any) -> tuple[float, Any]:
    """Seconds that a call takes, and its result."""
    wait()
    start = time.perf_counter()
    result = function(*values, **options)
    wait()
    return time.perf_counter() - start, result


def wait() -> None:
    """For the device to finish what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ask(model: Any, prompt: Tensor, **images: Any) -> Tensor:
    """The answer's first token."""
    mask = torch.ones_like(prompt)
    return model.generate(prompt, attention_mask=mask, max_new_tokens=1, **images)


def make_prompts(config: DAttnConfig, images: int, questions: int, text_tokens: int) -> Tensor:
    """Random questions, each after all images; int64 [questions, 1, images + text_tokens]."""
    shape = (questions, 1, text_tokens)
    # Ids above those of control tokens, which tokenizers put first.
    text = torch.randint(config.image_token_id + 1, config.text_config.vocab_size, shape)
    marks = torch.full((questions, 1, images), config.image_token_id)
    return torch.cat((marks, text), dim=-1)


def measure(model: Any, pixels: Tensor, prompts: Tensor) -> dict[str, float]:
    """Median seconds of encoding, and to the first token from pixels and from the cache.

    Args:
        model: a `DAttnForConditionalGeneration`.
        pixels: [images, 3, side, side], on the model's device.
        prompts: of `make_prompts`, there too; the first one warms up.

    Raises:
        AssertionError: an answer differs.
    """
    seconds: dict[str, list[float]] = {"encode": [], "pixels": [], "cache": []}
    for prompt in prompts:
        encoding, cache = timed(model.encode_images, pixels)
        from_pixels, expected = timed(ask, model, prompt, pixel_values=pixels)
        from_cache, answer = timed(ask, model, prompt, image_cache=cache)
        assert torch.equal(answer, expected), "the cache changed an answer"
        for name, value in zip(seconds, (encoding, from_pixels, from_cache), strict=True):
            seconds[name].append(value)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(0)
    model: Any = DAttnForConditionalGeneration.from_pretrained(arguments.model)
    model.to(arguments.device).eval()
    config = model.config
    side, rows = config.vision_config.image_size, arguments.images * config.rows_per_image
    pixels = torch.randn(arguments.images, 3, side, side).to(model.device)
    prompts = make_prompts(
        config, arguments.images, arguments.questions + 1, arguments.text_tokens
    ).to(model.device)
    seconds = measure(model, pixels, prompts)
    print(f"{rows} visual rows, {arguments.text_tokens} text tokens, {model.device}, {model.dtype}")
    print(f"encoding the images        {seconds['encode'] * 1e3:9.2f} ms, once")
    print(f"first token, from pixels   {seconds['pixels'] * 1e3:9.2f} ms per question")
    print(f"first token, from a cache  {seconds['cache'] * 1e3:9.2f} ms per question")
    print(f"ratio                      {seconds['pixels'] / seconds['cache']:9.2f}")


if __name__ == "__main__":
    main()
