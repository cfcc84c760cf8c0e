"""Published ways of attending over visual and text rows, by name. A preset is one entry here.

The cost of a layer is given with n visual rows, t text rows and p scored pairs; t (t + 1) / 2 pairs
of T2T, causal, are in every preset. Q, K, V, O and F stand for one row's operations in the query,
key, value and output projections and the FFN; a pair costs a = 4 * heads * head_dim. The rows'
share is t (Q + K + V + O + F) + n (K + V + O + F) unless a preset says otherwise. `cost.py` counts.
"""

from megatron_dattn.attention.config import AttentionConfig, Positions, TextToVisual
from megatron_dattn.attention.visual_rows import VisualRows
from megatron_dattn.errors import ConfigError

_AS_TEXT = TextToVisual(scope="following", rotary=True)
_SEQUENCE = Positions(text="gap", visual="sequence", embedding="none")

PRESETS: dict[str, AttentionConfig] = {
    # The paper's baseline and LLaVA's attention: visual rows are treated as text. One causal
    # softmax in reading order with one-dimensional rotary positions over all rows. Table 2, row 1.
    # No parameters. Cost: (n + t)(Q + K + V + O + F), p = (n + t)(n + t + 1) / 2.
    "s_attn": AttentionConfig(v2v="causal", v2t="preceding", t2v=_AS_TEXT, positions=_SEQUENCE),
    # The paper's method: V2V diagonal (section 2.2), T2V non-causal without rotary positions
    # (section 2.3), merged with T2T by alpha-weighting (section 2.4). Learnable row and column
    # embeddings stand in for the missing positions: the only parameters, in front of the layers.
    # The paper leaves the text ids open; counting text alone keeps them inside the range the
    # language model was trained on however large |V|. Cost: p = n t + T2T.
    "dattn": AttentionConfig(),
    # Diagonal V2V with the rotary positions kept in T2V: all rows have sequence ids, so visual rows
    # far from a text row are disfavoured (figure 2). Table 2, row 2: what debiasing is worth.
    # No parameters. Cost: as `dattn`.
    "dattn_biased": AttentionConfig(
        t2v=TextToVisual(scope="all", rotary=True), positions=_SEQUENCE
    ),
    # The cell that Table 2 leaves out: S-Attn with debiased T2V. V2V and V2T are causal with
    # sequence positions; text after an image sees all of it without rotary positions, and visual
    # rows get the learnable embedding. Text before an image must not see it here: the image has
    # seen that text, later words included, and would tell the answer. Cost: as `s_attn`.
    "s_attn_debias": AttentionConfig(
        v2v="causal",
        v2t="preceding",
        t2v=TextToVisual(scope="following", rotary=False),
        positions=Positions(text="gap", visual="sequence", embedding="row_column"),
    ),
    # The other merges of the paper's Table 3, and the plain sum. Masks, positions and embedding are
    # those of `dattn`; T2V and T2T each have a softmax of their own.
    # `dattn_sum` adds them, which doubles attention's scale at the start. Cost: as `dattn`.
    "dattn_sum": AttentionConfig(merge="sum"),
    # T2T + tanh(g) T2V, Flamingo's gate, here one g per query head and layer. With g = 0 the layer
    # is the language model's own; but then no gradient reaches the images before g has moved.
    "dattn_tanh": AttentionConfig(merge="tanh"),
    # (1 - s) T2T + s T2V with s = sigmoid(g), one g per query head and layer: alpha-weighting with
    # a constant alpha. Rows that see no image keep their T2T whole.
    "dattn_sigmoid": AttentionConfig(merge="sigmoid"),
    # T2V is a cross-attention module of its own in front of every self-attention, as in Flamingo:
    # t + W_o' XA(t, V), then T2T. Parameters: query, key, value and output projections per layer,
    # 1.34 billion for Mistral-7B, which is the paper's 9.0 B against 7.6 B. Their output starts at
    # zero, so the language model is at first itself. Cost: as `dattn` and t (Q + O) + n (K + V).
    "dattn_cascade": AttentionConfig(merge="cascade"),
    # The later video models of the paper's authors: T2V over all visual rows without positions,
    # added to T2T without a gate; text is counted alone. To attention this is `dattn_sum`. Vidi's
    # positions are an MLP of a patch's place as a share of the image's side, and visual rows pass a
    # last norm that starts at the scale of the text embeddings: 2 MLPs and 4 norms of parameters.
    # T2V has no sliding window, here as everywhere. Cost: as `dattn`.
    "vidi": AttentionConfig(merge="sum", positions=Positions(embedding="fractional")),
    # EE-MLLM's composite attention: no V2V, the layer's value, output and FFN weights align the
    # visual rows; one rotary softmax over images and text, and text before an image does not see
    # it. `dattn_biased` with the causal scope. No parameters. Cost: p = n t' + T2T for t' rows of
    # text after the image.
    "ee_mllm": AttentionConfig(t2v=_AS_TEXT, positions=_SEQUENCE),
    # NAAViT, "no attention among visual tokens", the pilot study of SAISA: as `ee_mllm`, but
    # attention adds nothing to visual rows; only their FFN transforms them. No parameters. Cost:
    # as `ee_mllm` without n O.
    "naavit": AttentionConfig(v2v="none", t2v=_AS_TEXT, positions=_SEQUENCE),
    # AKI's modality-mutual attention: S-Attn whose images also see the question that follows them.
    # The question is the sample's prompt (`TokenLayout.prompt_lengths`): only text without loss,
    # since labels would otherwise come back through the image. Without a prompt it is `s_attn`. No
    # parameters. Cost: as `s_attn` and n pairs for every prompt row after the image.
    "aki": AttentionConfig(v2v="causal", v2t="prompt", t2v=_AS_TEXT, positions=_SEQUENCE),
    # Concentric causal attention: the patches of a ring share a rotary id, counted from the border
    # to the centre; a patch sees its own ring and those around it. Text goes on after the centre's
    # id, so text is never far from any patch. The authors fix a grid of 24 x 24; here ring
    # min(i, j, H-1-i, W-1-j) of any H x W. No parameters. Cost: as `s_attn` with V2V pairs
    # (n^2 + sum of squared ring sizes) / 2, 0.555 n^2 for 24 x 24.
    "cca": AttentionConfig(
        v2v="ring",
        v2t="preceding",
        t2v=_AS_TEXT,
        positions=Positions(text="gap", visual="ring", embedding="none"),
    ),
    # SAISA: `naavit` whose visual rows have no state: every layer makes keys and values from the
    # encoder's features by a two-layer MLP of its own. Parameters: those MLPs, v d + d^2 per layer
    # for features of width v. Cost: t (Q + K + V + O + F) + n (K + V + 2 (v d + d^2)), pairs as
    # `ee_mllm`.
    "saisa": AttentionConfig(
        v2v="none",
        t2v=_AS_TEXT,
        positions=_SEQUENCE,
        visual=VisualRows(source="reproject", ffn=0.0),
    ),
    # ShortV: `s_attn` whose visual rows stay as they are in the layers that matter least to them:
    # no query, no output, no FFN, while text reads their keys and values. The authors find the
    # layers by measuring each (19 of 32 for LLaVA-1.5-7B); here the later 60 %. No parameters.
    # Cost of a frozen layer: t (Q + K + V + O + F) + n (K + V), pairs as `ee_mllm`.
    "shortv": AttentionConfig(
        v2v="causal",
        v2t="preceding",
        t2v=_AS_TEXT,
        positions=_SEQUENCE,
        visual=VisualRows(frozen=(0.4, 1.0)),
    ),
    # Visual rows leave after half of the layers (DyVTE learns where; this is a fixed exit): the
    # later layers see text alone, at its old positions. No parameters. Cost: as `s_attn` up to the
    # exit, then t (Q + K + V + O + F) and T2T.
    "exit": AttentionConfig(
        v2v="causal",
        v2t="preceding",
        t2v=_AS_TEXT,
        positions=_SEQUENCE,
        visual=VisualRows(exit=0.5),
    ),
    # FasterVLM: `s_attn` over the quarter of the patches that the encoder's own attention prefers.
    # CLIP's class token chooses them, as with the authors; SigLIP has none, so there they are those
    # that its patches attend to most. No parameters. Cost: as `s_attn` with n / 4.
    "fastervlm": AttentionConfig(
        v2v="causal",
        v2t="preceding",
        t2v=_AS_TEXT,
        positions=_SEQUENCE,
        visual=VisualRows(keep=0.25),
    ),
    # YOPO prunes what visual tokens do: a patch sees the 5 x 5 patches around it, before and after,
    # and the text before its image; some heads see no image; visual rows pass half of the FFN's
    # neurons; they leave after half of the layers. The authors choose the heads of each layer by
    # measurement; here the first three quarters of the key heads stay. No parameters. Cost up to
    # the exit: t (Q + K + V + O + F) + n (Q + K + V + O + F / 2), at most 25 n pairs of V2V.
    "yopo": AttentionConfig(
        v2v="window",
        v2v_window=5,
        v2t="preceding",
        t2v=_AS_TEXT,
        positions=_SEQUENCE,
        visual=VisualRows(ffn=0.5, heads=0.75, exit=0.5),
    ),
}


def get_preset(name: str) -> AttentionConfig:
    """The preset of that name. Raises ConfigError with the names there are."""
    if name not in PRESETS:
        raise ConfigError(f"unknown attention preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
