"""Shares of patches, heads and layers: rounding, and what is refused."""

import pytest

from megatron_dattn.attention.visual_config import (
    VisualTokensConfig,
    kept_grid,
    num_shared,
    rounded_share,
)
from megatron_dattn.errors import ConfigError


def test_kept_patches_form_a_line() -> None:
    assert kept_grid((4, 6), VisualTokensConfig()) == (4, 6)
    assert kept_grid((4, 6), VisualTokensConfig(keep=0.25)) == (1, 6)
    assert kept_grid((1, 2), VisualTokensConfig(keep=0.1)) == (1, 1)


@pytest.mark.parametrize(
    ("count", "share", "expected"),
    # Halves go up, for even and odd numbers alike; the share is the decimal that was written.
    [(3, 0.5, 2), (5, 0.5, 3), (7, 0.5, 4), (4, 0.5, 2), (50, 0.29, 15), (9, 0.25, 2), (3, 0.1, 0)],
)
def test_half_a_layer_is_rounded_up(count: int, share: float, expected: int) -> None:
    assert rounded_share(count, share) == expected
    assert num_shared(count, share) == max(1, expected)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({"keep": 0.0}, r"visual\.keep is a share above 0 and up to 1; it is 0\.0"),
        ({"heads": 1.5}, r"visual\.heads is a share"),
        ({"exit": -0.5}, r"visual\.exit is a share"),
        ({"ffn": 1.5}, r"visual\.ffn is a share from 0 to 1"),
        ({"keep": "half"}, r"visual\.keep is a share above 0 and up to 1; it is 'half'"),
        ({"frozen": (0.5, 0.5)}, r"visual\.frozen is a range"),
        ({"frozen": (0.5,)}, r"visual\.frozen is a range"),
        ({"frozen": 0.5}, r"visual\.frozen is a range"),
        ({"source": "reproject"}, "set ffn=0 with 'reproject'"),
        ({"source": "reproject", "ffn": 0.0, "frozen": (0.0, 1.0)}, "frozen has no effect"),
    ],
)
def test_impossible_shares_are_refused(tokens: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VisualTokensConfig(**tokens)  # type: ignore[arg-type]
