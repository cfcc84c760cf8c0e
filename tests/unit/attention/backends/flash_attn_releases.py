"""Arguments, with their defaults, of the raw operations of the flash-attn packages, per release.

Taken from Dao-AILab/flash-attention at the tags named; "main" is commit 0251105a of August 2026.
flash-attn 2: `flash_attn/flash_attn_interface.py`, `_flash_attn_varlen_forward` and `_backward`.
flash-attn 3: `hopper/flash_attn_interface.py`, `_flash_attn_forward` and `_flash_attn_backward`;
2.7.2 and older have no such operations over segments.
"""

from typing import NamedTuple


class Release(NamedTuple):
    """As they stand between the parentheses, without types."""

    forward: str
    backward: str


_FORWARD2 = (
    "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, "
    "causal, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, "
    "return_softmax=False, block_table=None, leftpad_k=None, seqused_k=None"
)
_BACKWARD2 = (
    "dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, "
    "max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, "
    "alibi_slopes, deterministic, rng_state=None"
)
_ZERO = ", zero_tensors=False"
FLASH_ATTN2 = {
    "2.7.0 to 2.7.2": Release(_FORWARD2, _BACKWARD2),
    "2.7.3 to 2.8.3": Release(_FORWARD2 + _ZERO, _BACKWARD2 + _ZERO),
    "main": Release(_FORWARD2 + _ZERO + ", num_splits=0", _BACKWARD2 + _ZERO),
}

_BACKWARD3 = (
    "dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, "
    "max_seqlen_q, max_seqlen_k, dq, dk, dv, softmax_scale, causal, window_size=(-1, -1), "
)
FLASH_ATTN3 = {
    "2.7.3 and 2.7.4": Release(
        "q, k, v, k_new, v_new, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, "
        "seqused_k, max_seqlen_q, max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos, "
        "rotary_sin, q_descale, k_descale, v_descale, softmax_scale, causal, window_size=(-1, -1), "
        "sink_token_length=0, softcap=0.0, rotary_interleaved=True, num_splits=1, pack_gqa=None, "
        "sm_margin=0",
        _BACKWARD3 + "sink_token_length=0, softcap=0.0, deterministic=False, sm_margin=0",
    ),
    "2.8.0 to 2.8.3": Release(
        "q, k, v, k_new, v_new, qv, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, "
        "seqused_k, max_seqlen_q, max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos, "
        "rotary_sin, seqlens_rotary, q_descale, k_descale, v_descale, softmax_scale, causal, "
        "window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True, "
        "scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0",
        _BACKWARD3 + "softcap=0.0, deterministic=False, sm_margin=0",
    ),
    "main": Release(
        "q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, "
        "cu_seqlens_k=None, cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, "
        "max_seqlen_q=None, max_seqlen_k=None, page_table=None, kv_batch_idx=None, leftpad_k=None, "
        "rotary_cos=None, rotary_sin=None, seqlens_rotary=None, q_descale=None, k_descale=None, "
        "v_descale=None, softmax_scale=None, causal=False, window_size_left=-1, "
        "window_size_right=-1, attention_chunk=0, softcap=0.0, rotary_interleaved=True, "
        "scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0",
        "dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, "
        "sequed_k=None, max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, "
        "softmax_scale=None, is_causal=False, window_size_left=-1, window_size_right=-1, "
        "softcap=0.0, deterministic=False, sm_margin=0",
    ),
}
