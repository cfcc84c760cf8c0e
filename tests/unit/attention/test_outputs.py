"""Who predicts the token after a text token that an image follows."""

import pytest

from megatron_dattn.attention import PRESETS, ImageSpan, TokenLayout
from megatron_dattn.attention.outputs import output_tokens
from tests.unit.attention.support import RICH_LAYOUT

ITSELF = list(range(15, 31))


@pytest.mark.parametrize("preset", ["dattn", "dattn_biased", "dattn_sum", "vidi"])
def test_text_that_sees_all_images_predicts_for_itself(preset: str) -> None:
    assert output_tokens(RICH_LAYOUT, PRESETS[preset]).tolist() == ITSELF


@pytest.mark.parametrize("preset", ["ee_mllm", "naavit"])
def test_images_that_read_no_text_predict_nothing(preset: str) -> None:
    """Though text does not see the image that follows it."""
    assert output_tokens(RICH_LAYOUT, PRESETS[preset]).tolist() == ITSELF


@pytest.mark.parametrize("preset", ["s_attn", "s_attn_debias", "aki"])
def test_text_before_an_image_hands_its_prediction_to_the_image(preset: str) -> None:
    expected = ITSELF.copy()
    expected[1] = 4  # two images follow text token 1 of sample 0: the second one's last token
    expected[4] = 7  # the image after the last text token, where no label is left to predict
    expected[12] = 11  # sample 3; the image of sample 2 stands before all text and takes nothing
    assert output_tokens(RICH_LAYOUT, PRESETS[preset]).tolist() == expected


def test_the_centre_of_a_concentric_image_predicts() -> None:
    """The last token in reading order is a corner, which sees the border alone."""
    layout = TokenLayout((2,), (ImageSpan(0, 1, (3, 5)),), visual_budget=15, text_budget=2)
    assert output_tokens(layout, PRESETS["cca"]).tolist() == [1 * 5 + 3, 16]
