"""Fixtures of `data`."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tests.unit.data.builders import make_tokenizer, save_processor


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer and preprocessor_config.json."""
    return save_processor(tmp_path_factory.mktemp("processor"))
