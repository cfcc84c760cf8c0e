"""What the model card says about training, and what it does without."""

from megatron_dattn.conversion.hf_export.model_card import model_card
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
    "progress": {"step": 40, "consumed_samples": 12345, "skipped_samples": 0},
    "validation": {"step": 30, "loss": 1.25},
    "parent": {
        "path": "/somewhere/private",
        "stage": "stage2",
        "step": 7,
        "data_sets": ["captions.jsonl"],
        "parent": {"stage": "stage1", "step": 5, "data_sets": None, "parent": IMPORT},
    },
}


def card(facts=FACTS, metrics=()):
    return model_card(
        ModelConfig(), title="my model", facts=facts, metrics=dict(metrics), license_name=None
    )


def test_every_stage_back_to_the_import_with_its_data():
    text = card()
    _, _, section = text.partition("## Training\n")
    assert section.partition("\n\n")[0].splitlines() == [
        "- stage3, step 40, on mix.jsonl, talk.jsonl",
        "  - consumed samples: 12,345",
        "- before that: stage2, step 7, on captions.jsonl",
        "- before that: stage1, step 5, on data that was not recorded",
        "- before that: import of siglip (vision_model), Mistral-7B (language_model)",
    ]
    assert "private" not in text


def test_title_and_last_validation():
    text = card()
    assert "\n# my model\n" in text
    assert "- validation loss at step 30: 1.2500\n" in text
    assert "None recorded." in card({"stage": "stage2"})


def test_metrics_stand_behind_the_validation_loss():
    text = card(metrics={"where, accuracy": 2 / 3, "asked": 8})
    _, _, section = text.partition("## Metrics\n")
    assert section.partition("\n\n")[0].splitlines() == [
        "- validation loss at step 30: 1.2500",
        "- where, accuracy: 0.666667",
        "- asked: 8",
    ]
