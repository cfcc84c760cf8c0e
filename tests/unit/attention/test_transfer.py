"""What is brought to the device together is there what it was on the host."""

import torch

from megatron_dattn.attention import get_preset
from megatron_dattn.attention.plan.parts import plan_attention
from megatron_dattn.attention.transfer import all_to_device
from tests.unit.attention.support import RICH_LAYOUT

TENSORS = [
    torch.arange(5),
    torch.tensor([True, False, True]),
    torch.empty(0, dtype=torch.int64),
    torch.arange(7, dtype=torch.int32),
    torch.rand(2, 3, dtype=torch.float64),
]


def test_shapes_dtypes_and_values_stay() -> None:
    for sent, got in zip(TENSORS, all_to_device(TENSORS, "cpu"), strict=True):
        assert torch.equal(sent, got)


def test_tensors_for_a_device_share_one_copy() -> None:
    sent = all_to_device(TENSORS, "meta")
    assert [(t.shape, t.dtype) for t in sent] == [(t.shape, t.dtype) for t in TENSORS]
    assert len({tensor.untyped_storage()._cdata for tensor in sent}) == 1
    # Kernels want their operands aligned.
    assert all(tensor.storage_offset() * tensor.element_size() % 16 == 0 for tensor in sent)


def test_all_tensors_of_a_plan_are_sent() -> None:
    for preset in ("dattn", "s_attn", "dattn_sum"):
        plan = plan_attention(RICH_LAYOUT, get_preset(preset), "meta")
        for part in (*plan.parts, *plan.visual_parts):
            indices = [part.query_tokens.index, part.key_tokens.index]
            tensors = [part.query_cu_seqlens, part.key_cu_seqlens]
            tensors += [index for index in indices if index is not None]
            assert {tensor.device.type for tensor in tensors} == {part.device.type} == {"meta"}
        assert plan.device.type == "meta"
