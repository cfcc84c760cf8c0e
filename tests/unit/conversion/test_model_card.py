"""What the model card says about training, and what it does without."""

import pytest

from megatron_dattn.conversion.model_card import METRICS_FILE, model_card
from megatron_dattn.models.config import ModelConfig

IMPORT = {
    "stage": "import",
    "step": 0,
    "sources": {"vision_model": "/somewhere/private/siglip", "language_model": "/else/Mistral-7B"},
}
FACTS = {
    "stage": "stage3",
    "step": 40,
    "data_sets": ["mix.jsonl", "talk.jsonl"],
    "progress": {"consumed_samples": 12345, "skipped_samples": 0},
    "validation": {"step": 30, "loss": 1.25},
    "parent": {
        "path": "/somewhere/private",
        "stage": "stage2",
        "step": 7,
        "data_sets": ["captions.jsonl"],
        "parent": {"stage": "stage1", "step": 5, "data_sets": None, "parent": IMPORT},
    },
}


def card(folder, facts=FACTS):
    return model_card(ModelConfig(), run_folder=folder, facts=facts, license_name=None)


def test_every_stage_back_to_the_import_with_its_data(tmp_path):
    text = card(tmp_path)
    _, _, section = text.partition("## Training\n")
    assert section.partition("\n\n")[0].splitlines() == [
        "- stage stage3, step 40, on mix.jsonl, talk.jsonl",
        "  - consumed samples: 12,345",
        "- before that: stage stage2, step 7, on captions.jsonl",
        "- before that: stage stage1, step 5, on data that was not recorded",
        "- before that: import of siglip (vision_model), Mistral-7B (language_model)",
    ]
    assert "private" not in text


def test_the_last_validation(tmp_path):
    assert "- validation loss at step 30: 1.2500\n" in card(tmp_path)
    assert "None recorded." in card(tmp_path, {"stage": "stage2"})


@pytest.mark.parametrize("content", ["{", "[1, 2]"])
def test_a_damaged_metrics_file_is_a_warning(tmp_path, caplog, content):
    (tmp_path / METRICS_FILE).write_text(content)
    assert "validation loss" in card(tmp_path)
    (warning,) = caplog.messages
    assert f"goes without {tmp_path / METRICS_FILE}" in warning
