"""The parts of a run, as its configuration wants them."""

from itertools import islice
from pathlib import Path

from megatron_dattn.config.pretrain import PretrainConfig
from megatron_dattn.models.config import LanguageConfig, ModelConfig, VisionConfig
from megatron_dattn.training.build import loader_of_rank
from tests.unit.data.builders import data_config, make_dataset, make_records, save_processor


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
