"""The backbones: real Hugging Face checkpoints, real configs, and training that learns."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    MistralForCausalLM,
    PreTrainedTokenizerBase,
    SiglipVisionModel,
)

from examples.quickstart.language_backbone import (
    SEQUENCE_LENGTH,
    pretrain_language,
    token_batches,
)
from examples.quickstart.make_backbones import make_backbones
from examples.quickstart.make_tokenizer import make_tokenizer
from examples.quickstart.vision_backbone import (
    EMPTY,
    patch_targets,
    picture_batches,
    preprocess,
    pretrain_vision,
)
from megatron_dattn.errors import DataError


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backbones")
    make_tokenizer(folder / "tokenizer")
    make_backbones(folder / "tokenizer", folder, vision_steps=3, language_steps=3)
    return folder


@pytest.fixture(scope="module")
def tokenizer(backbones: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(backbones / "mistral", local_files_only=True)


def test_vision_checkpoint_is_a_siglip_encoder(backbones: Path) -> None:
    model = SiglipVisionModel.from_pretrained(backbones / "siglip", local_files_only=True)
    config = model.config
    assert config.model_type == "siglip_vision_model"
    assert (config.image_size, config.patch_size, config.hidden_act) == (
        32,
        8,
        "gelu_pytorch_tanh",
    )
    assert (backbones / "siglip" / "model.safetensors").is_file()
    pixels, classes = next(picture_batches(2, 3, seed=0))
    output = model(pixel_values=pixels)
    assert output.last_hidden_state.shape == (3, 16, config.hidden_size)
    assert classes.shape == (3, 4)
    assert int(classes.max()) <= EMPTY


def test_preprocessing_is_what_the_saved_config_says(backbones: Path) -> None:
    from PIL import Image
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    processor = SiglipImageProcessorPil.from_pretrained(backbones / "siglip")
    noise = torch.randint(0, 256, (64, 64, 3), generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(noise.to(torch.uint8).numpy())
    expected = processor(image, return_tensors="pt").pixel_values[0]
    actual = torch.from_numpy(preprocess(image, 32))
    # Both resize to whole 8-bit values; the normalisation differs in float32 rounding alone.
    torch.testing.assert_close(actual, expected.float(), atol=1e-6, rtol=0)


def test_language_checkpoint_is_a_mistral(
    backbones: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = MistralForCausalLM.from_pretrained(backbones / "mistral", local_files_only=True)
    config = model.config
    assert config.model_type == "mistral"
    assert config.vocab_size == len(tokenizer)
    assert config.num_attention_heads == 2 * config.num_key_value_heads
    assert config.head_dim * config.num_attention_heads == config.hidden_size
    assert not config.tie_word_embeddings
    assert config.sliding_window is None
    assert config.rope_parameters["rope_theta"] == 1_000_000.0
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)
    logits = model(input_ids=torch.tensor([tokenizer("top left").input_ids])).logits
    assert torch.isfinite(logits).all()


def test_language_documents_start_with_bos_and_are_deterministic(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    first, again, other = (
        next(token_batches(tokenizer, 2, batch_size=4, seed=seed)) for seed in (0, 0, 1)
    )
    assert first.shape == (4, SEQUENCE_LENGTH)
    assert int(first[0, 0]) == tokenizer.bos_token_id
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_each_patch_is_named_after_its_own_cell() -> None:
    targets = patch_targets(torch.tensor([[0, 1, 2, 3]]), grid=2)
    expected = [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    assert targets.view(4, 4).tolist() == expected


def test_pretraining_learns(
    tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    """A few dozen steps take each loss well below that of guessing evenly."""
    pretrain_vision(num_steps=60, batch_size=32, log_every=60)
    pretrain_language(tokenizer, num_steps=25, batch_size=4, log_every=25)
    vision, language = (
        float(line.split("loss ")[1].split(",")[0])
        for line in capsys.readouterr().out.splitlines()
        if "loss" in line
    )
    assert vision < 2 * 2.2  # two heads of log(11) = 2.4 each
    assert language < 4.0  # log(448) = 6.1


def test_missing_tokenizer_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="make_tokenizer first"):
        make_backbones(tmp_path, tmp_path)
