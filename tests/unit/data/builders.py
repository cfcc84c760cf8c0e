"""Small real things for the tests of `data`: a tokenizer, images, data sets, a config."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_dattn.data.config import DataConfig, DatasetConfig
from megatron_dattn.data.conversation import Conversation, parse_record
from megatron_dattn.data.encoder import ModelSizes
from megatron_dattn.data.loader import VLMLoader, build_loader
from megatron_dattn.data.prepare import write_jsonl
from megatron_dattn.data.prepared_shards import ShardSize, write_shards

IMAGE_SIZE = 16
PATCH_SIZE = 8
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[control_8]", "<image>")
CORPUS = (
    "what is in the picture ? a red square on a green field , number 1 2 3 4 5 6 7 8 9 0",
    "where is the blue circle ? it is left of the square . Describe the image in one sentence",
)


def make_tokenizer(
    special_tokens: Sequence[str] = SPECIAL_TOKENS, *, bos: str = "<s>", eos: str = "</s>"
) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer with sentencepiece's habits: `_` for spaces, bytes for the unknown."""
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=450, special_tokens=[*special_tokens, *alphabet], show_progress=False
        ),
    )
    specials = [AddedToken(token, special=True, normalized=False) for token in special_tokens]
    plain = json.loads(tokenizer.to_str())
    plain["added_tokens"] = []
    tokenizer = Tokenizer.from_str(json.dumps(plain))
    tokenizer.add_special_tokens(specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token=bos, eos_token=eos
    )


def save_processor(folder: Path, *, image_size: int = IMAGE_SIZE) -> Path:
    """A folder with the tokenizer and the image processor."""
    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer().save_pretrained(folder)
    settings = {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": image_size, "width": image_size},
        "resample": 3,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "rescale_factor": 1 / 255,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def record(question: str, answer: str, image: str | list[str] | None = None) -> dict[str, Any]:
    """A LLaVA record with one exchange."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns} if image is None else {"image": image, "conversations": turns}


def conversation(*texts: str, images: int = 0, system: str | None = None) -> Conversation:
    """Questions and answers in turn."""
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    paths = ["x.png"] * images or None
    return parse_record({"conversations": turns, "image": paths, "system": system})


def save_image(path: Path, seed: int, side: int = 20) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def make_records(folder: Path, count: int, *, images: int = 8) -> list[dict[str, Any]]:
    """Records of different lengths; every fifth is text-only, every seventh has two images."""
    for index in range(images):
        save_image(folder / "images" / f"{index}.png", seed=index)
    records = []
    for index in range(count):
        name = f"images/{index % images}.png"
        answer = "a red square " * (1 + index % 4) + str(index)
        if index % 5 == 4:
            records.append(record("what is number 1 ?", answer))
        elif index % 7 == 6:
            records.append(record("<image> and <image> ?", answer, [name, "images/0.png"]))
        else:
            records.append(record("what is in the picture ?\n<image>", answer, name))
    return records


def make_dataset(folder: Path, records: list[dict[str, Any]], name: str = "set") -> DatasetConfig:
    """Write and index records; images are looked up in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(records, folder / f"{name}.jsonl")
    return DatasetConfig(path=str(folder / f"{name}.jsonl"))


def make_shards(
    folder: Path,
    records: list[dict[str, Any]],
    name: str = "shards",
    *,
    size: int = 10_000,
    images: Path | None = None,
) -> DatasetConfig:
    """Write records as a WebDataset with Energon's index; images are looked up in `folder`."""
    output = folder / name
    output.mkdir(parents=True)
    write_shards(
        enumerate(records),
        output,
        image_root=images or folder,
        source=None,
        size=ShardSize(size),
    )
    return DatasetConfig(path=str(output))


def model_sizes(*, vocab_size: int = 512, image_size: int = IMAGE_SIZE) -> ModelSizes:
    side = image_size // PATCH_SIZE
    return ModelSizes(image_size, (side, side), vocab_size)


def data_config(processor: Path, **changes: Any) -> DataConfig:
    settings: dict[str, Any] = {
        "tokenizer": str(processor),
        "visual_budget": 16,
        "text_budget": 256,
        "packing_buffer_size": 8,
        "num_workers": 0,
    }
    return DataConfig(**{**settings, **changes})


def make_loader(
    config: DataConfig, datasets: list[DatasetConfig], *, training: bool = True, **changes: Any
) -> VLMLoader:
    settings: dict[str, Any] = {
        "sizes": model_sizes(),
        "micro_batch_size": 4,
        "data_parallel_rank": 0,
        "data_parallel_size": 1,
        "seed": 5,
    }
    return build_loader(config, datasets=datasets, training=training, **{**settings, **changes})
