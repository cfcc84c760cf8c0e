"""Mixtures in LLaVA-NeXT's form."""

from pathlib import Path

import pytest

from megatron_dattn.data.mixture import Source, read_mixture
from megatron_dattn.errors import DataError


def test_a_mixture_is_read_as_meant(tmp_path: Path) -> None:
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text("datasets: [{json_path: 007, image_root: on, weight: 1e-1}]\n")
    assert read_mixture(mixture) == [Source(tmp_path / "007", tmp_path / "on", 0.1)]


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "datasets: []",
        "datasets: [{path: x}]",
        "datasets: [{json_path: x, n: 1}]",
        "datasets: [{json_path: [5]}]",
        "datasets: [{json_path: x, weight: 1:30}]",
        "datasets: [{json_path: x, weight: heavy}]",
        "datasets: [{json_path: x, weight: 0}]",
        "datasets: [{json_path: x, weight: 665298}]",
        "\xff",
    ],
)
def test_mixtures_of_another_form_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "mixture.yaml"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(DataError, match="mixture"):
        read_mixture(path)
