"""The merge as one would first write it: autograd through sigmoid(S_V - S_T).

With a flash kernel the log-sum-exp carries no gradient: alpha is a constant to autograd and the
gradients of queries and keys are wrong. Tests use this to show that they would notice.
"""

import torch
from torch import Tensor

from megatron_dattn.attention import AttentionConfig
from megatron_dattn.attention.backends.base import Backend, ScoreFunction
from megatron_dattn.attention.layout import TokenLayout
from megatron_dattn.attention.plan.parts import plan_attention
from megatron_dattn.attention.positions import apply_rotary
from megatron_dattn.attention.reference import pair_masks
from tests.unit.attention.support import Problem


def naive_attention(
    problem: Problem, layout: TokenLayout, config: AttentionConfig, *, lse_has_gradient: bool
) -> Tensor:
    """The `dattn` preset in two dense parts and an ordinary merge, [S, Hq, D]."""
    first_text = layout.visual_budget
    seen, _ = pair_masks(layout, config)
    group = problem.query.shape[1] // problem.key.shape[1]
    keys, values = (x.repeat_interleave(group, dim=1) for x in (problem.key, problem.value))
    scale = problem.query.shape[-1] ** -0.5

    def part(query: Tensor, key: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
        scores = torch.einsum("qhd,khd->qhk", query[first_text:], key[columns]) * scale
        hidden = ~seen[first_text:, columns].unsqueeze(1)
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min / 2)
        lse = torch.logsumexp(scores, dim=-1, keepdim=True)
        return torch.einsum("qhk,khd->qhd", torch.softmax(scores, -1), values[columns]), lse

    visual_out, visual_lse = part(problem.query, keys, slice(0, first_text))
    rotated_query, rotated_key = (apply_rotary(x, problem.rotary) for x in (problem.query, keys))
    text_out, text_lse = part(rotated_query, rotated_key, slice(first_text, layout.num_tokens))
    if not lse_has_gradient:
        visual_lse, text_lse = visual_lse.detach(), text_lse.detach()
    alpha_visual = torch.sigmoid(visual_lse - text_lse)
    text = alpha_visual * visual_out + (1 - alpha_visual) * text_out
    text = text * seen[first_text:].any(-1)[:, None, None]
    return torch.cat((values[:first_text], text))


def constant_alpha_gradients(
    problem: Problem, layout: TokenLayout, config: AttentionConfig, backend: Backend
) -> tuple[Tensor, Tensor]:
    """Query and key gradients when each part's backward has its own (out, lse).

    That is what autograd does with alpha * out_V + (1 - alpha) * out_T when the kernel's
    log-sum-exp, and so alpha, is a constant to it.
    """
    plan = plan_attention(layout, config, problem.query.device)
    query, grad_out = (
        problem.query[layout.visual_budget :],
        problem.grad_out[layout.visual_budget :],
    )
    cos, sin = problem.rotary
    tables = (cos[layout.visual_budget :], sin[layout.visual_budget :])
    score_function = ScoreFunction(query.shape[-1] ** -0.5)
    grad_query, grad_key = torch.zeros_like(problem.query), torch.zeros_like(problem.key)
    with torch.no_grad():
        runs = []
        for part in plan.parts:
            q = apply_rotary(query, tables) if part.rotary else query
            k = apply_rotary(problem.key, problem.rotary) if part.rotary else problem.key
            tokens = (part.query_tokens.take(q), part.key_tokens.take(k))
            tokens = (*tokens, part.key_tokens.take(problem.value))
            runs.append((part, tokens, *backend.forward(*tokens, part, score_function)))
        total = torch.full_like(query[..., 0], -torch.inf, dtype=runs[0][3].dtype)
        for part, _, _, lse in runs:
            part.query_tokens.put(total, torch.logaddexp(part.query_tokens.take(total), lse))
        for part, tokens, out, lse in runs:
            alpha = torch.exp(lse - part.query_tokens.take(total)).unsqueeze(-1)
            do = (part.query_tokens.take(grad_out) * alpha).to(query.dtype)
            dq, dk, _ = backend.backward(do, *tokens, out, lse, part, score_function)
            if part.rotary:
                back = [part.query_tokens.take(table) for table in (tables[0], -tables[1])]
                dq = apply_rotary(dq, (back[0], back[1]))
                dk = apply_rotary(dk, (part.key_tokens.take(cos), part.key_tokens.take(-sin)))
            part.query_tokens.add(grad_query[layout.visual_budget :], dq)
            part.key_tokens.add(grad_key, dk)
    return grad_query, grad_key
