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

import torch

from megatron_dattn.hf.modeling_dattn import DAttnForConditionalGeneration


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, required=True, help="folder of an export")
    parser.add_argument("--images", type=int, default=1, help="images of the prompt")
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--text-tokens", type=int, default=64, help="length of a question")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def timed(function: Callable[[], torch.Tensor], device: torch.device) -> tuple[float, torch.Tensor]:
    """Seconds that a call takes, and its result."""
    wait(device)
    start = time.perf_counter()
    result = function()
    wait(device)
    return time.perf_counter() - start, result


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    model: DAttnForConditionalGeneration, images: int, questions: int, text_tokens: int
) -> dict[str, float]:
    """Median seconds to the first token, and of the encoding that the cache spares.

    Raises:
        AssertionError: an answer differs.
    """
    device, config = model.device, model.config
    side = config.vision_config.image_size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(images, 3, side, side, generator=generator).to(device)
    marks = torch.full((1, images), config.image_token_id)
    # Ids above the control tokens, which every tokenizer puts first.
    texts = torch.randint(
        config.image_token_id + 1,
        config.text_config.vocab_size,
        (questions + 1, 1, text_tokens),
        generator=generator,
    )
    prompts = [torch.cat((marks, text), dim=1).to(device) for text in texts]
    encoding, cache = [], None
    fresh, cached = [], []
    for number, prompt in enumerate(prompts):

        def ask(prompt: torch.Tensor = prompt, **given: object) -> torch.Tensor:
            mask = torch.ones_like(prompt)
            return model.generate(prompt, attention_mask=mask, max_new_tokens=1, **given)

        seconds, _ = timed(lambda: model.encode_images(pixels).keys[-1], device)
        cache = cache or model.encode_images(pixels)
        with_pixels, expected = timed(lambda ask=ask: ask(pixel_values=pixels), device)
        with_cache, answer = timed(lambda ask=ask, c=cache: ask(image_cache=c), device)
        assert torch.equal(answer, expected), "the cache changed an answer"
        if number:  # the first question warms up
            encoding.append(seconds)
            fresh.append(with_pixels)
            cached.append(with_cache)
    return {
        "encode": statistics.median(encoding),
        "pixels": statistics.median(fresh),
        "cache": statistics.median(cached),
    }


def main() -> None:
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    model = DAttnForConditionalGeneration.from_pretrained(arguments.model).to(device).eval()
    seconds = measure(model, arguments.images, arguments.questions, arguments.text_tokens)
    rows = arguments.images * model.config.rows_per_image
    print(f"{rows} visual rows, {arguments.text_tokens} text tokens, {device}, {model.dtype}")
    print(f"encoding the images        {seconds['encode'] * 1e3:9.2f} ms, once")
    print(f"first token, from pixels   {seconds['pixels'] * 1e3:9.2f} ms per question")
    print(f"first token, from a cache  {seconds['cache'] * 1e3:9.2f} ms per question")
    print(f"ratio                      {seconds['pixels'] / seconds['cache']:9.2f}")


if __name__ == "__main__":
    main()
