"""Files that an older version wrote are read as what they meant."""

from pathlib import Path

import pytest

from megatron_dattn.config.cli import load_config
from megatron_dattn.config.renamed_keys import RENAMED, with_current_keys
from megatron_dattn.errors import ConfigError


def test_an_old_file_is_read_as_what_it_meant(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("training:\n  savings: {unread_rows: false, ffn_chunk_rows: 64}\n")
    savings = load_config(path).training.savings
    assert not savings.unread_tokens
    assert savings.ffn_chunk_tokens == 64


@pytest.mark.parametrize("old", RENAMED)
def test_a_value_under_both_names_is_refused(old: str) -> None:
    content: dict = {}
    for key in (old, RENAMED[old]):
        *sections, name = key.split(".")
        inner = content
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = 1
    with pytest.raises(ConfigError, match=f"{old} is the old name of {RENAMED[old]}"):
        with_current_keys(content)


def test_other_content_is_left_alone() -> None:
    content = {"training": {"seed": 1}, "model": None, "data": {"train": [{"path": "a"}]}}
    assert with_current_keys(content) == content
