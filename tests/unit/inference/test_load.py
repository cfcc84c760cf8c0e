"""What ends an answer, by template."""

import pytest

from megatron_dattn.data.images import ImagePreprocessor
from megatron_dattn.data.template import ConversationTokenizer
from megatron_dattn.inference.load import RunAssets
from tests.unit.data.builders import make_tokenizer
from tests.unit.data.test_template_families import TOKENIZERS


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        ("mistral_v3", {"</s>"}),
        ("vicuna_v1", {"</s>"}),
        ("gemma", {"<end_of_turn>", "<eos>"}),
        ("llama3", {"<|eot_id|>", "<|end_of_text|>"}),
        ("plain", {"</s>", "<0x0A>"}),
    ],
)
def test_stop_ids(template, ends):
    tokenizer = TOKENIZERS[template] if template in TOKENIZERS else make_tokenizer()
    conversations = ConversationTokenizer(tokenizer, template)
    assets = RunAssets(tokenizer, conversations, ImagePreprocessor(16), config=None)
    assert assets.stop_ids == {tokenizer.convert_tokens_to_ids(token) for token in ends}
