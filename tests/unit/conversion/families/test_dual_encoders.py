"""Vision encoders as they are published: SigLIP's and CLIP's whole dual encoders, and single ones.

The hub's SigLIP, SigLIP 2 and CLIP-L folders hold both encoders, `vision_model.*` and
`text_model.*`; a folder that transformers 4 wrote of the vision encoder alone kept the prefix.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from megatron_dattn.checkpoint import find_checkpoint
from megatron_dattn.checkpoint.tensors import open_tensors
from megatron_dattn.conversion.families.registry import vision_family, vision_rules
from megatron_dattn.conversion.hf_import.plan import plan_import
from megatron_dattn.conversion.hf_import.run import import_checkpoint
from megatron_dattn.conversion.verify.imported import FEATURES, verify_checkpoint
from megatron_dattn.errors import CheckpointError
from megatron_dattn.models.config import VisionConfig
from tests.unit.conversion.hf_models import VISION_SIZES, save_language, save_vision, vary_norms

TEXT_SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
DUAL = {
    "siglip": (SiglipModel, SiglipConfig, {}),
    "clip": (CLIPModel, CLIPConfig, {"projection_dim": 24}),
}


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dual") / "language"
    save_language(folder)
    return folder


def save_dual(folder: Path, family: str) -> dict[str, torch.Tensor]:
    """A dual encoder's folder with the image processor of the family; its vision tensors."""
    save_vision(folder, family=family)  # for the image processor
    torch.manual_seed(3)
    model_class, config_class, more = DUAL[family]
    config = config_class(text_config=TEXT_SIZES, vision_config=VISION_SIZES, **more)
    model = model_class(config).eval()
    vary_norms(model)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    assert any(name.startswith("text_model.") for name in tensors)
    prefix = "vision_model."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def assert_holds(run: Path, vision: VisionConfig, originals: dict[str, torch.Tensor]) -> None:
    stored = open_tensors(find_checkpoint(run).path)
    for rule in vision_rules(vision):
        parts = rule.layout.split(stored[f"vision_model.{rule.megatron}"].load())
        for part, name in zip(parts, rule.sources, strict=True):
            assert torch.equal(part.reshape(originals[name].shape), originals[name]), name


@pytest.mark.parametrize("family", DUAL)
def test_a_dual_encoder_gives_its_vision_encoder(tmp_path, language, family):
    originals = save_dual(tmp_path / "vision", family)
    assert json.loads((tmp_path / "vision" / "config.json").read_text())["model_type"] == family
    model = import_checkpoint(tmp_path / "vision", language, tmp_path / "run", dtype="fp32")
    assert model.vision.family == family
    assert_holds(tmp_path / "run", model.vision, originals)
    found = {
        comparison.what: comparison.largest for comparison in verify_checkpoint(tmp_path / "run")
    }
    assert found[FEATURES] < 1e-4  # fp32 through another implementation


@pytest.mark.parametrize("family", DUAL)
def test_a_dual_encoder_without_its_vision_encoder_is_refused(tmp_path, language, family):
    save_dual(tmp_path / "vision", family)
    path = tmp_path / "vision" / "model.safetensors"
    kept = {n: t for n, t in load_file(path).items() if not n.startswith("vision_model.encoder.")}
    save_file(kept, path)
    with pytest.raises(CheckpointError, match=r"missing encoder\.layers\.0\."):
        plan_import(tmp_path / "vision", language, tmp_path / "run")


@pytest.mark.parametrize("family", DUAL)
def test_a_single_encoder_may_keep_the_prefix_of_transformers_4(tmp_path, language, family):
    save_vision(tmp_path / "vision", family=family, varied=True)
    path = tmp_path / "vision" / "model.safetensors"
    bare = {name.removeprefix("vision_model."): t for name, t in load_file(path).items()}
    for prefix in ("", "vision_model."):
        save_file({prefix + name: tensor for name, tensor in bare.items()}, path)
        run = tmp_path / f"run-{prefix}"
        model = import_checkpoint(tmp_path / "vision", language, run, dtype="fp32")
        assert_holds(run, model.vision, bare)


# The vision sections of published config.json files, with all that stands in them.
PUBLISHED: dict[str, tuple[dict[str, Any], VisionConfig]] = {
    "google/siglip-so400m-patch14-384": (
        {
            "initializer_factor": 1.0,
            "model_type": "siglip",
            "text_config": {"model_type": "siglip_text_model", "hidden_size": 1152},
            "vision_config": {
                "hidden_size": 1152,
                "image_size": 384,
                "intermediate_size": 4304,
                "model_type": "siglip_vision_model",
                "num_attention_heads": 16,
                "num_hidden_layers": 27,
                "patch_size": 14,
            },
        },
        VisionConfig(),
    ),
    # A fixed resolution: the architecture is SigLIP's, the tokenizer's size Gemma's.
    "google/siglip2-base-patch16-512": (
        {
            "architectures": ["SiglipModel"],
            "initializer_factor": 1.0,
            "model_type": "siglip",
            "text_config": {"model_type": "siglip_text_model", "vocab_size": 256000},
            "vision_config": {"image_size": 512, "model_type": "siglip_vision_model"},
        },
        VisionConfig(
            hidden_size=768,
            num_hidden_layers=12,
            num_attention_heads=12,
            intermediate_size=3072,
            image_size=512,
            patch_size=16,
        ),
    ),
    "openai/clip-vit-large-patch14-336": (
        {
            "logit_scale_init_value": 2.6592,
            "model_type": "clip",
            "projection_dim": 768,
            "text_config": {"hidden_size": 768, "model_type": "clip_text_model"},
            "text_config_dict": {"hidden_size": 768},
            "vision_config": {
                "dropout": 0.0,
                "hidden_act": "quick_gelu",
                "hidden_size": 1024,
                "image_size": 336,
                "intermediate_size": 4096,
                "layer_norm_eps": 1e-05,
                "model_type": "clip_vision_model",
                "num_attention_heads": 16,
                "num_hidden_layers": 24,
                "patch_size": 14,
                "projection_dim": 768,
            },
            "vision_config_dict": {"hidden_size": 1024, "image_size": 336},
        },
        VisionConfig(
            family="clip",
            hidden_size=1024,
            num_hidden_layers=24,
            num_attention_heads=16,
            intermediate_size=4096,
            image_size=336,
            patch_size=14,
            layer_norm_eps=1e-5,
            hidden_act="quick_gelu",
        ),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name):
    config, expected = PUBLISHED[name]
    assert vision_family(config).vision_config(config) == expected


def test_siglip_2_of_any_resolution_is_another_model():
    naflex = {"model_type": "siglip2", "vision_config": {"num_patches": 256}}
    with pytest.raises(CheckpointError, match=r"'siglip2'; supported: clip, .* siglip"):
        vision_family(naflex)


@pytest.mark.parametrize("resample", [2, 3])
def test_siglip_2_s_image_processor_is_kept(tmp_path, language, resample):
    """Fixed resolutions of SigLIP 2 resize bilinearly, SigLIP bicubically."""
    save_dual(tmp_path / "vision", "siglip")
    path = tmp_path / "vision" / "preprocessor_config.json"
    settings = json.loads(path.read_text()) | {"resample": resample, "do_convert_rgb": None}
    path.write_text(json.dumps(settings | {"processor_class": "SiglipProcessor"}))
    import_checkpoint(tmp_path / "vision", language, tmp_path / "run")
    kept = json.loads((tmp_path / "run" / "tokenizer" / path.name).read_text())
    assert kept["resample"] == resample
