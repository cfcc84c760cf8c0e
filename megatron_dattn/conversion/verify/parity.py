"""The two sides of a comparison: the training code's model and Hugging Face's, with equal weights.

A checkpoint may hold fewer digits than the folder it came from: an import stores BF16 unless told
otherwise. Hugging Face's parameters are therefore rounded to the checkpoint's dtype, so that what
is compared is the conversion and the computation, not the rounding that the user has chosen.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_dattn.attention.layout import ImageSpan, TokenLayout
from megatron_dattn.batch import IGNORED_LABEL, PackedBatch
from megatron_dattn.checkpoint.tensors import StoredTensor
from megatron_dattn.errors import CheckpointError
from megatron_dattn.models.build import build_model
from megatron_dattn.models.config import ModelConfig
from megatron_dattn.models.execution import ExecutionConfig
from megatron_dattn.models.model_identity import described, require_same
from megatron_dattn.models.vlm import DAttnVLM
from megatron_dattn.parallel.config import ParallelConfig
from megatron_dattn.runtime.distributed import get_device, one_process
from megatron_dattn.runtime.progress import ByteProgress, unseen

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
_NUM_TOKENS = 64


def rounding(tensors: Mapping[str, StoredTensor], dtype: str) -> torch.dtype | None:
    """The dtype to which Hugging Face's parameters are rounded before they compute in `dtype`.

    Returns:
        None where the checkpoint stores its parameters in at least that precision.
    """
    ((stored, _),) = Counter(tensor.dtype for tensor in tensors.values()).most_common(1)
    return stored if stored.itemsize < DTYPES[dtype].itemsize else None


def load_pretrained(
    kind: Any,
    folder: Path,
    dtype: torch.dtype,
    *,
    rounded_to: torch.dtype | None = None,
    trust_code: bool = False,
) -> nn.Module:
    """A model as transformers loads it from a folder, on the device.

    Args:
        kind: one of transformers' auto classes.
        rounded_to: the dtype whose values all parameters take before they become `dtype`.
        trust_code: run the code that the folder brings.

    Raises:
        CheckpointError: transformers refuses the folder.
    """
    try:
        model = kind.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=trust_code,
            use_safetensors=True,
        )
    except Exception as error:  # a strange config.json can raise anything in there
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{folder} cannot be loaded by transformers: {reason}") from error
    if rounded_to is not None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(rounded_to))
    return model.eval().to(get_device())


@contextmanager
def our_model(
    config: ModelConfig,
    tensors: Mapping[str, StoredTensor],
    dtype: str,
    progress: ByteProgress = unseen,
) -> Iterator[DAttnVLM]:
    """The training code's model with a checkpoint's parameters, in one process, on the device.

    A conversion lacks parameters that text never meets; those keep their initial values.
    """
    execution = ExecutionConfig(
        precision="bf16" if dtype == "bf16" else "fp32", transformer_impl="local"
    )
    with one_process():
        model = build_model(config, ParallelConfig(), execution).eval().to(DTYPES[dtype])
        found = {name: p for name, p in model.named_parameters() if name in tensors}
        num_bytes = sum(tensors[name].num_bytes for name in found)
        with torch.no_grad(), progress("reading the checkpoint", num_bytes) as advance:
            for name, parameter in found.items():
                parameter.copy_(tensors[name].load())
                advance(tensors[name].num_bytes)
        yield model


def one_text(
    config: ModelConfig, ids: Tensor, pixels: Tensor, image_offsets: Sequence[int] = ()
) -> PackedBatch:
    """A batch of one text, on the device.

    Args:
        ids: int64 [text tokens], without `<image>`.
        pixels: [at least as many images as are seen, 3, side, side], any floating dtype.
        image_offsets: how many text tokens stand in front of each image.
    """
    spans = tuple(
        ImageSpan(sample=0, text_offset=offset, grid=config.image_grid) for offset in image_offsets
    )
    length = len(ids)
    batch = PackedBatch(
        layout=TokenLayout(
            (length,), spans, sum(span.num_tokens for span in spans), length, (length,)
        ),
        input_ids=ids,
        labels=torch.full_like(ids, IGNORED_LABEL),
        pixel_values=pixels[: len(spans)],
        sample_keys=["0"],
    )
    return batch.to(get_device())


def text_logits(model: DAttnVLM, batch: PackedBatch) -> Tensor:
    """Logits [text tokens, vocabulary] of a batch, of the model's dtype, on the CPU."""
    tokens = torch.arange(batch.layout.visual_budget, batch.layout.num_tokens)
    return model.forward_logits(batch, tokens.to(get_device())).cpu()


def token_ids(tokens: Sequence[int] | None, vocab_size: int) -> Tensor:
    """The ids of one text, int64 [tokens]; random ones where None."""
    if tokens is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(vocab_size, (_NUM_TOKENS,), generator=generator)
    wrong = [token for token in tokens if not 0 <= token < vocab_size]
    if wrong or not tokens:
        raise CheckpointError(
            f"--tokens {wrong or 'without any'}: ids go from 0 to {vocab_size - 1}"
        )
    return torch.tensor(tokens)


def random_pixels(side: int) -> Tensor:
    """Two images, float32 [2, 3, side, side], of values between -1 and 1."""
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def check_same_model(
    folder: Path, theirs: ModelConfig, ours: ModelConfig, *, holds_preset: bool = True
) -> None:
    """Raise CheckpointError, naming all fields, unless two models compute the same.

    Args:
        theirs: what the folder's config.json describes.
        ours: what the checkpoint's manifest, or the run's configuration, describes.
        holds_preset: whether the folder has what an attention preset adds to a plain model.
    """
    held = {"modules": ["adapter"], "has_added": holds_preset}
    require_same(
        described(ours),
        described(theirs) | held,
        "compare with",
        complaint=f"{folder} holds another model than the checkpoint",
        remedy="give the folder that belongs to it",
    )
