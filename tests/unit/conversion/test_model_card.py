"""What the model card says about training, and what it does without."""

import pytest

from megatron_dattn.conversion.model_card import METRICS_FILE, model_card
from megatron_dattn.models.config import ModelConfig

FACTS = {
    "stage": "stage2",
    "step": 40,
    "validation": {"step": 30, "loss": 1.25},
    "parent": {"path": "/somewhere/private", "stage": "stage1", "step": 7},
}


def card(folder, facts=FACTS):
    return model_card(
        ModelConfig(), run_folder=folder, facts=facts, data_sets=["mix"], license_name=None
    )


def test_the_last_validation_and_where_the_weights_began(tmp_path):
    text = card(tmp_path)
    assert "- validation loss at step 30: 1.2500\n" in text
    assert "- started from: stage stage1, step 7\n" in text
    assert "private" not in text
    assert "None recorded." in card(tmp_path, {"stage": "stage2"})


@pytest.mark.parametrize("content", ["{", "[1, 2]"])
def test_a_damaged_metrics_file_is_a_warning(tmp_path, caplog, content):
    (tmp_path / METRICS_FILE).write_text(content)
    assert "validation loss" in card(tmp_path)
    (warning,) = caplog.messages
    assert f"goes without {tmp_path / METRICS_FILE}" in warning
