"""Arguments of the exported code: honoured, or refused by name; never taken and forgotten."""

import ast
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from megatron_dattn import hf
from megatron_dattn.hf.configuration_dattn import DAttnConfig
from megatron_dattn.hf.modeling_dattn import DAttnForConditionalGeneration, DAttnModel
from megatron_dattn.hf.processing_dattn import DAttnProcessor
from tests.unit.hf.conftest import CASES

IMAGE, PAD = 5, 2
# transformers passes settings here that its image processor has checked; the answer has no use for
# them.
FREE = {"replace_image_token"}


@pytest.fixture
def model(exported: Callable[[str], tuple[Path, Path]]) -> Callable[[str], Any]:
    return lambda case: DAttnForConditionalGeneration.from_pretrained(exported(case)[1]).eval()


def batch_of(rows: list[list[int]], *, left: bool = True) -> dict[str, Tensor]:
    """Inputs of prompts with an image for each IMAGE, padded on one side."""
    width = max(map(len, rows))
    padding = [[PAD] * (width - len(row)) for row in rows]
    ids = [pad + row if left else row + pad for row, pad in zip(rows, padding, strict=True)]
    lengths = torch.tensor([[len(row)] for row in rows])
    column = torch.arange(width).expand(len(rows), width)
    mask = column >= width - lengths if left else column < lengths
    count = sum(row.count(IMAGE) for row in rows)
    pixels = torch.randn(count, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": mask.long()}
    return {**inputs, "pixel_values": pixels} if count else inputs


def functions_with_free_keywords() -> Iterator[tuple[str, ast.FunctionDef]]:
    for path in sorted(Path(hf.__file__).parent.glob("*_dattn.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.args.kwarg is not None:
                yield f"{path.name}: {node.name}", node


def test_free_keywords_are_passed_on() -> None:
    found = dict(functions_with_free_keywords())
    assert found, "the search finds what there is"
    for where, function in found.items():
        assert function.args.kwarg is not None
        name = function.args.kwarg.arg
        passed = [
            keyword
            for call in ast.walk(function)
            if isinstance(call, ast.Call)
            for keyword in call.keywords
            if keyword.arg is None and isinstance(keyword.value, ast.Name)
            if keyword.value.id == name
        ]
        assert passed or function.name in FREE, f"{where} takes **{name} and drops it"


@pytest.mark.parametrize("kind", [DAttnModel, DAttnForConditionalGeneration])
def test_forward_takes_named_arguments_only(kind: Any) -> None:
    parameters = inspect.signature(kind.forward).parameters
    assert all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    assert not {"position_ids", "cache_position"} & set(parameters), "`generate` would make them"


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"position_ids": torch.zeros(1, 3)}, TypeError, "position_ids"),
        ({"cache_position": torch.zeros(3)}, TypeError, "cache_position"),
        ({"token_type_ids": torch.zeros(1, 3)}, TypeError, "token_type_ids"),
        ({"output_attentions": True}, ValueError, "output_attentions"),
        ({"inputs_embeds": torch.zeros(1, 3, 48)}, ValueError, "inputs_embeds"),
        ({"labels": torch.zeros(1, 3).long(), "logits_to_keep": 1}, ValueError, "logits_to_keep"),
        ({"attention_mask": torch.ones(1, 1, 3, 3)}, ValueError, "attention_mask of shape"),
        (
            {"cache": DynamicCache(), "past_key_values": DynamicCache()},
            ValueError,
            "two names of one argument",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    model: Callable[[str], Any], arguments: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        model("dattn")(torch.tensor([[1, 7, 8]]), **arguments)


def test_other_caches_are_refused(model: Callable[[str], Any]) -> None:
    inputs = batch_of([[1, IMAGE, 7]])
    implementations = ["static"]
    if torch.version.cuda is None or torch.cuda.is_available():
        # With a CUDA build and no device transformers fails at its own stream, before our code.
        implementations.append("offloaded")
    for implementation in implementations:
        with pytest.raises(ValueError, match="DAttnCache"):
            model("dattn").generate(**inputs, cache_implementation=implementation)


def test_the_cache_goes_by_both_names(model: Callable[[str], Any]) -> None:
    dattn, inputs = model("dattn"), batch_of([[1, IMAGE, 7]])
    more = torch.tensor([[8]])
    found = []
    for name in ("past_key_values", "cache"):
        with torch.inference_mode():
            kept = dattn(**inputs, use_cache=True).to_tuple()[1]
            found.append(dattn(more, use_cache=True, **{name: kept}).logits)
    assert torch.equal(*found)


def test_hidden_states_are_given(model: Callable[[str], Any]) -> None:
    dattn = model("dattn")
    with torch.inference_mode():
        outputs = dattn(**batch_of([[1, IMAGE, 7]]), output_hidden_states=True)
        logits = dattn.lm_head(outputs.hidden_states[-1])
    assert len(outputs.hidden_states) == dattn.config.text_config.num_hidden_layers + 1
    assert torch.equal(logits[:, [0, 2]], outputs.logits[:, [0, 2]])


@pytest.mark.parametrize("words", [{"megre": "sum"}, {"sliding_window": 4}])
def test_a_misspelt_setting_is_refused(words: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=next(iter(words))):
        DAttnConfig(**words)


def test_audio_is_refused(exported: Callable[[str], tuple[Path, Path]]) -> None:
    processor = DAttnProcessor.from_pretrained(exported("dattn")[1])
    with pytest.raises(ValueError, match="audio was given"):
        processor(text="<s>", audio=[[0]])


@pytest.mark.parametrize("case", CASES)
def test_the_last_text_answers_for_an_image_at_the_end(
    model: Callable[[str], Any], case: str
) -> None:
    """Also on either side of padding; the model's own row of that text is the expected one."""
    dattn = model(case)
    rows = [[1, 7, IMAGE], [1, 8, 9, IMAGE, IMAGE], [1, IMAGE], [1, IMAGE, 7, 9]]
    expected = []
    for row in rows:
        with torch.inference_mode():
            logits = dattn(**batch_of([row])).logits[0]
        expected.append(logits[max(i for i, token in enumerate(row) if token != IMAGE)])
        # The same hidden state twice in one product: which of its rows share a block of the kernel,
        # and so the order of the sums, depends on the processor.
        torch.testing.assert_close(logits[-1], expected[-1], rtol=1e-5, atol=1e-6)
    # Each batch numbers its pictures anew, so only prompts whose picture is the first are compared.
    for left in (True, False):
        inputs = batch_of([rows[0], [1, 8, 9, 10, 11]], left=left)
        with torch.inference_mode():
            last = dattn(**inputs, logits_to_keep=1).logits[0, 0]
        # fp32 sums of other lengths.
        torch.testing.assert_close(last, expected[0], rtol=1e-4, atol=1e-4)


def test_an_image_without_text_is_refused(model: Callable[[str], Any]) -> None:
    with pytest.raises(ValueError, match="sample 1 of the batch is <image> without any text"):
        model("dattn").generate(**batch_of([[1, IMAGE], [IMAGE]]), max_new_tokens=2)


def test_the_loss_is_divided_by_the_number_that_is_given(model: Callable[[str], Any]) -> None:
    dattn = model("dattn")
    inputs = batch_of([[1, IMAGE, 7, 8, 2]])
    labels = torch.tensor([[-100, -100, 7, 8, 2]])
    assert dattn.accepts_loss_kwargs
    with torch.no_grad():
        mean = dattn(**inputs, labels=labels).loss
        for number in (12, torch.tensor(12)):
            shared = dattn(**inputs, labels=labels, num_items_in_batch=number).loss
            torch.testing.assert_close(shared, mean * 3 / 12)


def gradients(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("case", ["dattn", "dattn_cascade", "saisa"])
def test_checkpointing_leaves_gradients_as_they_are(
    model: Callable[[str], Any], case: str, is_frozen: bool
) -> None:
    """Frozen but for some projections of every layer, as adapters are, nothing in front is trained;
    that is where reentrant checkpointing loses gradients."""
    dattn = model(case).train()
    if is_frozen:
        for name, parameter in dattn.named_parameters():
            parameter.requires_grad_("v_proj" in name)
    inputs = batch_of([[1, IMAGE, 7, 8, 2], [1, 9, IMAGE, 2]])
    plain = gradients(dattn, inputs)
    assert any("vision_tower" in name and g.abs().max() > 0 for name, g in plain.items())
    for reentrant in (False, True):
        dattn.gradient_checkpointing_enable({"use_reentrant": reentrant})
        found = gradients(dattn, inputs)
        for name, expected in plain.items():
            # The same operations once more; fp32 sums may be grouped anew.
            torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6)


def test_checkpointing_and_caches_exclude_each_other(model: Callable[[str], Any]) -> None:
    dattn, inputs = model("dattn"), batch_of([[1, IMAGE, 7]])
    kept = dattn(**inputs, use_cache=True).to_tuple()[1]
    dattn.train().gradient_checkpointing_enable()
    assert len(dattn(**inputs, use_cache=True).to_tuple()) == 1, "logits, and no cache"
    with pytest.raises(ValueError, match="cannot go on from a cache"):
        dattn(torch.tensor([[8]]), cache=kept)
