"""Image processor of an export."""

import json
from pathlib import Path
from typing import Any

from megatron_dattn.conversion.families.llava import SELECT_STRATEGIES
from megatron_dattn.conversion.io.hf_folder import AUTO_MAP
from megatron_dattn.data.conversation import IMAGE_TOKEN
from megatron_dattn.data.images import ImagePreprocessor
from megatron_dattn.models.config import VisionConfig


def write_processor(
    preprocessor: ImagePreprocessor, target: Path, *, llava_vision: VisionConfig | None
) -> None:
    """Write processor_config.json, and the image processor in a file of its own.

    transformers 5 would write both into one file, which the older releases of 4 cannot read; with
    a copy in each, an edit of one would be lost on some readers.

    Args:
        llava_vision: the encoder, for Hugging Face's LlavaProcessor; None for ours.
    """
    _write_json(target / "preprocessor_config.json", _image_processor(preprocessor))
    config: dict[str, Any] = {"image_token": IMAGE_TOKEN}
    if llava_vision is None:
        config |= {
            "processor_class": "DAttnProcessor",
            "auto_map": {"AutoProcessor": AUTO_MAP["AutoProcessor"]},
            "image_fit": preprocessor.image_fit,
        }
        if preprocessor.resolutions is not None:
            config["image_grid_pinpoints"] = [list(each) for each in preprocessor.resolutions]
        if preprocessor.video_frames != ImagePreprocessor.video_frames:
            config["video_frames"] = preprocessor.video_frames
    else:
        config |= {
            "processor_class": "LlavaProcessor",
            "patch_size": llava_vision.patch_size,
            "vision_feature_select_strategy": SELECT_STRATEGIES[llava_vision.family],
            # The class token is counted here, and the strategy takes it away again.
            "num_additional_image_tokens": llava_vision.num_places - llava_vision.num_patches,
        }
    _write_json(target / "processor_config.json", config)


def _image_processor(preprocessor: ImagePreprocessor) -> dict[str, Any]:
    side = preprocessor.image_size
    square = {"height": side, "width": side}
    if preprocessor.image_fit == "crop":
        kind = {
            "image_processor_type": "CLIPImageProcessor",
            "do_center_crop": True,
            "crop_size": square,
            "size": {"shortest_edge": side},
        }
    else:
        kind = {"image_processor_type": "SiglipImageProcessor", "size": square}
    return {
        **kind,
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": int(preprocessor.resample),
        "do_rescale": True,
        "rescale_factor": preprocessor.rescale_factor,
        "do_normalize": True,
        "image_mean": list(preprocessor.mean),
        "image_std": list(preprocessor.std),
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
