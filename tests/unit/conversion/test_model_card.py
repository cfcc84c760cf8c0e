"""What the model card says about training, and what it does without."""

from megatron_dattn.conversion.model_card import model_card
from megatron_dattn.models.config import ModelConfig

FACTS = {
    "stage": "stage2",
    "step": 40,
    "validation": {"step": 30, "loss": 1.25},
    "parent": {"path": "/somewhere/private", "stage": "stage1", "step": 7},
}


def card(facts=FACTS, metrics=()):
    return model_card(
        ModelConfig(),
        title="my model",
        facts=facts,
        data_sets=["mix"],
        metrics=dict(metrics),
        license_name=None,
    )


def test_the_last_validation_and_where_the_weights_began():
    text = card()
    assert "\n# my model\n" in text
    assert "- validation loss at step 30: 1.2500\n" in text
    assert "- started from: stage stage1, step 7\n" in text
    assert "private" not in text
    assert "None recorded." in card({"stage": "stage2"})


def test_metrics_stand_behind_the_validation_loss():
    text = card(metrics={"where, accuracy": 2 / 3, "asked": 8})
    _, _, section = text.partition("## Metrics\n")
    assert section.partition("\n\n")[0].splitlines() == [
        "- validation loss at step 30: 1.2500",
        "- where, accuracy: 0.666667",
        "- asked: 8",
    ]
