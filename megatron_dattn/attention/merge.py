"""How what a token reads from images joins what it reads from text.

Alpha-weighting: partial softmaxes over disjoint keys become one (paper section 2.4).

Attention over a set of keys can be cut into subsets (equations 3 to 6): each subset's softmax
output counts with its share of the exponential mass. With S the log-sum-exp of a subset's scores
(equation 8) the share of V against T is alpha_V = sigmoid(S_V - S_T) (equation 9). The result has
the log-sum-exp log(e^S_V + e^S_T) and is itself such a part, so any number of parts merge pairwise,
in any order.

The other merges (the paper's Table 3) keep two softmaxes, and weigh their results by numbers that
do not depend on the scores: here autograd needs no help, and each part has its own gradient.
"""

import torch
from torch import Tensor

from megatron_dattn.attention.config import Merge


def merge_dtype(dtype: torch.dtype) -> torch.dtype:
    """Float64 stays; everything else merges in float32, since BF16 would triple the error."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def alpha_merge(
    visual_out: Tensor, visual_lse: Tensor, text_out: Tensor, text_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Equation 7: alpha_V * XA(t, V) + alpha_T * SA(t, T), and the merged log-sum-exp.

    Outputs are [tokens, heads, D], log-sum-exps [tokens, heads]; the result is float32 (float64 for
    float64). A token without keys has output 0 and log-sum-exp -inf; merging two of them gives
    another, never NaN.
    """
    dtype = merge_dtype(visual_out.dtype)
    # Two tokens without keys: -inf - -inf is NaN and either weight will do.
    alpha_visual = torch.sigmoid((visual_lse - text_lse).nan_to_num()).to(dtype)
    out = torch.lerp(text_out.to(dtype), visual_out.to(dtype), alpha_visual.unsqueeze(-1))
    return out, torch.logaddexp(visual_lse, text_lse)


def weighted_merge(
    visual_out: Tensor,
    text_out: Tensor,
    merge: Merge,
    gate: Tensor | None,
    sees_images: Tensor,
) -> Tensor:
    """Join two softmaxes' outputs [tokens, heads, D], of one dtype, by a merge that is not "alpha".

    "sum" adds them. "tanh" adds tanh(gate) of the visual one. "sigmoid" takes sigmoid(gate) of the
    visual one and the rest of the text's, and text alone where a token sees no image. `gate` is
    [heads] or [1], of any floating dtype, None for "sum"; `sees_images` is bool [tokens]. The
    result has the inputs' dtype.

    Visual outputs are zero in tokens that see no image, and the gate stays in the graph there: a
    pack without images gives it a gradient of zero, as every rank of a data-parallel group needs.
    """
    visual, text = (out.to(merge_dtype(out.dtype)) for out in (visual_out, text_out))
    if gate is not None:
        gate = gate.to(visual.dtype).unsqueeze(-1)
    match merge, gate:
        case "sum", None:
            out = text + visual
        case "tanh", Tensor():
            out = torch.addcmul(text, visual, torch.tanh(gate))
        case "sigmoid", Tensor():
            weight = torch.sigmoid(gate) * sees_images[:, None, None]
            out = torch.lerp(text, visual, weight)
        case _:
            raise ValueError(f"merge '{merge}' {'with' if gate is not None else 'without'} a gate")
    return out.to(text_out.dtype)
