"""Published ways of attending over visual and text tokens, by name. A preset is one entry here.

`about` says where a preset comes from, what it shows to whom, what it adds and what it costs;
`python tools/show_preset.py PRESET` prints it, with `NOTATION`, and `planner/decoder_flops.py`
counts the operations.
"""

from megatron_dattn.attention.config import AttentionConfig, Positions, TextToVisual
from megatron_dattn.attention.visual_config import VisualTokensConfig
from megatron_dattn.errors import ConfigError

NOTATION = """\
Cost is that of a layer with n visual tokens, t text tokens and p scored pairs; t (t + 1) / 2 pairs
of T2T, causal, are in every preset. Q, K, V, O and F stand for one token's operations in the query,
key, value and output projections and the FFN; a pair costs 4 * heads * head_dim. The tokens cost
t (Q + K + V + O + F) + n (K + V + O + F) unless a preset says otherwise."""

_AS_TEXT = TextToVisual(scope="following", rotary=True)
_SEQUENCE = Positions(text="gap", visual="sequence", embedding="none")

PRESETS: dict[str, AttentionConfig] = {
    "s_attn": AttentionConfig(
        about="""
        The paper's baseline (Table 2, row 1) and LLaVA's attention: visual tokens are treated as
        text. Mask: one causal softmax in reading order. Positions: rotary, one-dimensional, over
        all tokens. A sliding window counts all tokens. Parameters: none.
        Cost: (n + t) (Q + K + V + O + F), p = (n + t) (n + t + 1) / 2.
        """,
        v2v="causal",
        v2t="preceding",
        t2v=_AS_TEXT,
        positions=_SEQUENCE,
    ),
    "dattn": AttentionConfig(
        about="""
        The paper's method. Mask: V2V diagonal (section 2.2), T2V not causal (section 2.3), joined
        with T2T by alpha-weighting (section 2.4). Positions: T2V has no rotary ones; learnable
        embeddings of a patch's row and column stand in for them. The paper leaves the text ids
        open; counting text alone keeps them inside the range that the language model was trained
        on, however large |V|. Parameters: the embedding, in front of the layers.
        Cost: p = n t + T2T.
        """,
    ),
    "dattn_biased": AttentionConfig(
        about="""
        Table 2, row 2: what debiasing is worth. Mask: as `dattn`. Positions: T2V keeps the rotary
        ones, and all tokens have ids in sequence, so visual tokens far from a text token are
        disfavoured (figure 2). Parameters: none. Cost: as `dattn`.
        """,
        t2v=TextToVisual(scope="all", rotary=True),
        positions=_SEQUENCE,
    ),
    "s_attn_debias": AttentionConfig(
        about="""
        The cell that Table 2 leaves out: `s_attn` with debiased T2V. Mask: as `s_attn`. Text before
        an image must not see it here: the image has seen that text, later words included, and would
        tell the answer. Positions: V2V, V2T and T2T in sequence; T2V has no rotary ones, and visual
        tokens get the learnable embedding. Parameters: the embedding. Cost: as `s_attn`.
        """,
        v2v="causal",
        v2t="preceding",
        t2v=TextToVisual(scope="following", rotary=False),
        positions=Positions(text="gap", visual="sequence", embedding="row_column"),
    ),
    "dattn_sum": AttentionConfig(
        about="""
        One of the other merges, the plain sum: T2V and T2T each have a softmax of their own and are
        added, which doubles attention's scale at the start. Mask, positions and embedding: as
        `dattn`. Parameters: the embedding. Cost: as `dattn`.
        """,
        merge="sum",
    ),
    "dattn_tanh": AttentionConfig(
        about="""
        A merge of the paper's Table 3, Flamingo's gate: T2T + tanh(g) T2V, two softmaxes, one g per
        query head. With g = 0 the layer is the language model's own; but then no gradient reaches
        the images before g has moved. Mask, positions and embedding: as `dattn`. Parameters: the
        embedding, and a gate per query head and layer. Cost: as `dattn`; a gate is no product of
        matrices.
        """,
        merge="tanh",
    ),
    "dattn_sigmoid": AttentionConfig(
        about="""
        A merge of the paper's Table 3: (1 - s) T2T + s T2V with s = sigmoid(g), two softmaxes, one
        g per query head: alpha-weighting with a constant alpha. Tokens that see no image keep their
        T2T whole. Mask, positions and embedding: as `dattn`. Parameters: the embedding, and a gate
        per query head and layer. Cost: as `dattn`; a gate is no product of matrices.
        """,
        merge="sigmoid",
    ),
    "dattn_cascade": AttentionConfig(
        about="""
        A merge of the paper's Table 3, as in Flamingo: T2V is a cross-attention module of its own
        in front of every self-attention, t + W_o' XA(t, V), then T2T. Its output starts at zero, so
        the language model is at first itself. Mask, positions and embedding: as `dattn`.
        Parameters: the embedding, and query, key, value and output projections per layer, 1.34
        billion for Mistral-7B, which is the paper's 9.0 B against 7.6 B.
        Cost: as `dattn` and t (Q + O) + n (K + V).
        """,
        merge="cascade",
    ),
    "vidi": AttentionConfig(
        about="""
        Vidi, the later video models of the paper's authors: T2V over all visual tokens, added to
        T2T without a gate. To attention this is `dattn_sum`. The adapter's norm stands behind its
        MLP.
        Positions: text is counted alone; those of a patch are an MLP of its place as a share of the
        image's side, one for rows and one for columns, and visual tokens pass a last norm that
        starts at the scale of the text embeddings. T2V has no sliding window. The adapter is that
        of their images without tiles, so that its weights would fit; the noise that they add to the
        places in training is left out. Parameters: two MLPs and two norms, in front of the layers.
        Cost: as `dattn`.
        """,
        merge="sum",
        positions=Positions(embedding="fractional"),
    ),
    "ee_mllm": AttentionConfig(
        about="""
        EE-MLLM's composite attention. Mask: no V2V, the layer's value, output and FFN weights align
        the visual tokens; text before an image does not see it. It is `dattn_biased` with the
        causal
        scope: one rotary softmax over images and text. Positions: in sequence. Parameters: none.
        Cost: p = n t' + T2T for t' tokens of text after the image.
        """,
        t2v=_AS_TEXT,
        positions=_SEQUENCE,
    ),
    "naavit": AttentionConfig(
        about="""
        NAAViT, "no attention among visual tokens", the pilot study of SAISA. Mask and positions: as
        `ee_mllm`, but attention adds nothing to visual tokens; only their FFN transforms them.
        Parameters: none. Cost: t (Q + K + V + O + F) + n (K + V + F), pairs as `ee_mllm`.
        """,
        v2v="none",
        t2v=_AS_TEXT,
        positions=_SEQUENCE,
    ),
    "aki": AttentionConfig(
        about="""
        AKI's modality-mutual attention. Mask: `s_attn` whose images also see the question that
        follows them. The question is the sample's prompt (`TokenLayout.prompt_lengths`): only text
        without loss, since labels would otherwise come back through the image. Without a prompt it
        is `s_attn`. Positions: in sequence. Parameters: none.
        Cost: as `s_attn` and n pairs for every prompt token after the image.
        """,
        v2v="causal",
        v2t="prompt",
        t2v=_AS_TEXT,
        positions=_SEQUENCE,
    ),
    "cca": AttentionConfig(
        about="""
        Concentric causal attention. Mask: a patch sees its own ring and those around it, and what
        stands before the image; text is causal. Positions: the patches of a ring share a rotary id,
        counted from the border to the centre, and text goes on after the centre's id, so text is
        never far from any patch. The authors fix a grid of 24 x 24; here ring
        min(i, j, H-1-i, W-1-j) of any H x W. Parameters: none.
        Cost: as `s_attn` with V2V pairs (n^2 + sum of squared ring sizes) / 2, 0.555 n^2 for
        24 x 24.
        """,
        v2v="ring",
        v2t="preceding",
        t2v=_AS_TEXT,
        positions=Positions(text="gap", visual="ring", embedding="none"),
    ),
    "saisa": AttentionConfig(
        about="""
        SAISA: `naavit` whose visual tokens have no state: every layer makes keys and values from
        the encoder's features by an MLP of two linear layers of its own. The released code has no
        norm in front of that MLP; ours has the adapter's RMSNorm, since features leave the encoder
        unnormalized. Mask and positions: as `naavit`. Parameters: per layer, for features of width
        v and a model of width d, v d + d^2 in the MLP (and its 2 d biases) and v in the norm; there
        is no adapter. Cost: t (Q + K + V + O + F) + n (K + V + 2 (v d + d^2)), pairs as `ee_mllm`.
        """,
        v2v="none",
        t2v=_AS_TEXT,
        positions=_SEQUENCE,
        visual=VisualTokensConfig(source="reproject", ffn=0.0),
    ),
    "shortv": AttentionConfig(
        about="""
        ShortV: `s_attn` whose visual tokens stay as they are in the layers that matter least to
        them: no query, no output, no FFN, while text reads their keys and values. The authors find
        the layers by measuring each (19 of 32 for LLaVA-1.5-7B); here the later 60 %. Positions: in
        sequence. A sliding window counts all tokens in every layer. Parameters: none.
        Cost: as `s_attn` in the first 40 % of the layers; in a frozen one
        t (Q + K + V + O + F) + n (K + V), pairs as `ee_mllm`.
        """,
        v2v="causal",
        v2t="preceding",
        t2v=_AS_TEXT,
        positions=_SEQUENCE,
        visual=VisualTokensConfig(frozen=(0.4, 1.0)),
    ),
    "exit": AttentionConfig(
        about="""
        DyVTE with a fixed exit (the authors learn where): `s_attn` whose visual tokens leave after
        half of the layers; the later ones see text alone, at its old positions. Parameters: none.
        Cost: as `s_attn` up to the exit, then t (Q + K + V + O + F) and T2T.
        """,
        v2v="causal",
        v2t="preceding",
        t2v=_AS_TEXT,
        positions=_SEQUENCE,
        visual=VisualTokensConfig(exit=0.5),
    ),
    "fastervlm": AttentionConfig(
        about="""
        FasterVLM: `s_attn` over the quarter of the patches that the encoder attends to most, in
        their order. CLIP's class token chooses them, as with the authors: by its attention, on
        average over heads, in the layer of the features. SigLIP has no class token; there a patch
        counts by what it receives on average from all patches. Positions: in sequence over the
        patches that are kept. Parameters: none. Cost: as `s_attn` with n / 4.
        """,
        v2v="causal",
        v2t="preceding",
        t2v=_AS_TEXT,
        positions=_SEQUENCE,
        visual=VisualTokensConfig(keep=0.25),
    ),
    "yopo": AttentionConfig(
        about="""
        YOPO prunes what visual tokens do. Mask: a patch sees the 5 x 5 patches around it, before
        and after, and the text before its image. The first three quarters of the key heads deal
        with images (the authors choose heads by measuring each layer); in the others images'
        values count as zero, in a softmax over all keys. Visual tokens pass half of the FFN's
        neurons and leave after half of the layers. There our text tokens have a softmax over text
        alone, where the authors' simulation zeroes the values of visual keys and so makes the
        rest smaller. Positions: in sequence. Parameters: none.
        Cost up to the exit: t (Q + K + V + O + F) + n (Q + K + V + O + F / 2) and
        p = 25 n (V2V, at most) + n (t - t') (V2T) + n t' (T2V) + T2T for t' tokens of text after
        the image; then t (Q + K + V + O + F) and T2T. The heads save nothing here: they are masked,
        and their scores computed.
        """,
        v2v="window",
        v2v_window=5,
        v2t="preceding",
        t2v=_AS_TEXT,
        positions=_SEQUENCE,
        visual=VisualTokensConfig(ffn=0.5, heads=0.75, exit=0.5),
    ),
}


def get_preset(name: str) -> AttentionConfig:
    """The preset of that name. Raises ConfigError with the names there are."""
    if name not in PRESETS:
        raise ConfigError(f"unknown attention preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
