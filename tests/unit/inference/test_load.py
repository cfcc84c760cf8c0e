"""What ends an answer, by template; what names a checkpoint of a run."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_dattn.data.conversation import Conversation, Turn
from megatron_dattn.data.images import ImagePreprocessor
from megatron_dattn.data.template import ConversationTokenizer
from megatron_dattn.errors import ConfigError
from megatron_dattn.inference.load import RunAssets, run_and_step
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


def test_a_caption_ends_also_where_its_full_stop_and_line_break_are_one_token():
    """As in Llama-3's vocabulary; "\u010a" is how byte-level tokenizers spell a line break."""
    names = ["<s>", "</s>", "<image>", "a", ".", "\u010a", ".\u010a", "\u010aa"]
    vocab = {name: index for index, name in enumerate(names)}
    backend = Tokenizer(models.BPE(vocab, merges=[(".", "\u010a"), ("\u010a", "a")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", extra_special_tokens=names[2:3]
    )
    caption = ConversationTokenizer(tokenizer, "plain")
    assets = RunAssets(tokenizer, caption, ImagePreprocessor(16), config=None)
    turns = (Turn("user", "<image>", 1), Turn("assistant", "a."))
    last = caption(Conversation(turns, ("x",))).input_ids[-1]
    assert tokenizer.convert_ids_to_tokens(last) == ".\u010a"
    assert assets.stop_ids == {vocab[end] for end in ("</s>", "\u010a", ".\u010a")}


def test_a_run_or_one_of_its_checkpoints(tmp_path, monkeypatch):
    assert run_and_step(tmp_path) == (tmp_path, None)
    assert run_and_step(tmp_path, 3) == (tmp_path, 3)
    step = tmp_path / "step-0000400"
    step.mkdir()
    for given in (None, 400):
        assert run_and_step(step, given) == (tmp_path, 400)
    monkeypatch.chdir(step)
    assert run_and_step(step.relative_to(step)) == (tmp_path, 400)
    with pytest.raises(ConfigError, match="is the checkpoint of step 400, not of 3; name one"):
        run_and_step(step, 3)


def test_a_link_means_the_step_that_it_is_named_after(tmp_path):
    (tmp_path / "step-0000400").mkdir()
    for name in ("best", "step-0000500"):
        (tmp_path / name).symlink_to("step-0000400")
    assert run_and_step(tmp_path / "best") == (tmp_path, 400)
    # Its manifest then says that it is of another step.
    assert run_and_step(tmp_path / "step-0000500") == (tmp_path, 500)
