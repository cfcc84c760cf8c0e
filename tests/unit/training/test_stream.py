"""A run's packs are those that its configuration wants; a rank without any ends the run on all."""

import logging
import re
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_dattn.config.pretrain import PretrainConfig
from megatron_dattn.data.config import DatasetConfig
from megatron_dattn.errors import DataError
from megatron_dattn.models.config import LanguageConfig, ModelConfig, VisionConfig
from megatron_dattn.training.stream import BatchStream, loader_of_rank
from tests.support.distributed import run_distributed
from tests.unit.data.builders import (
    data_config,
    make_dataset,
    make_loader,
    make_records,
    save_processor,
)


def _first_packs(folder: str, num_workers: int) -> str:
    """Rank 1's host has no images."""
    logging.disable(logging.CRITICAL)
    rank = dist.get_rank()
    images = Path(folder) / ("nothing" if rank == 1 else "")
    config = data_config(
        Path(folder) / "tokenizer", num_workers=num_workers, max_skipped_fraction=1.0
    )
    loader = make_loader(
        config,
        [DatasetConfig(f"{folder}/set.jsonl", image_root=str(images))],
        data_parallel_rank=rank,
        data_parallel_size=2,
    )
    try:
        BatchStream(loader, torch.device("cpu")).load(2)
    except DataError as error:
        return str(error)
    return "went on"


def test_no_share_is_too_large_and_yet_one_rank_without_a_record_ends_all(tmp_path: Path) -> None:
    rows = [row for row in make_records(tmp_path, 40) if "image" in row]
    make_dataset(tmp_path, rows)
    save_processor(tmp_path / "tokenizer")
    (tmp_path / "nothing").mkdir()
    first, second = run_distributed(_first_packs, 2, str(tmp_path), 0)
    assert first == second
    assert re.match(r"rank 1 \(host .+\): data-parallel rank 1 met 10000 samples in a row", first)
    assert "missing_image" in first
    assert "\n" not in first


def test_images_have_the_tokens_that_the_preset_keeps(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, make_records(tmp_path, 50))
    model = ModelConfig(
        vision=VisionConfig(image_size=16, patch_size=8),
        language=LanguageConfig(vocab_size=512),
        attention="fastervlm",
    )
    processor = save_processor(tmp_path / "processor")
    config = PretrainConfig(model=model, data=data_config(processor, visual_budget=2))
    assert model.vision.num_patches == 4
    batches = list(islice(loader_of_rank(config, [dataset], 0, 1, training=True), 5))
    assert {image.grid for batch in batches for image in batch.layout.images} == {(1, 1)}
    assert max(len(batch.layout.images) for batch in batches) == 2
