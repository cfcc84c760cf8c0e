"""What a rank keeps of one micro-batch for its backward pass, and what that pass needs besides.

Tensor by tensor, each with its shape: `d` is the hidden size, `q` the queries' width, `e` that of
the keys, `f` the FFN's, all but `d` cut over tensor-parallel ranks. Norms, SwiGLU and attention are
fused, as on a GPU: a norm keeps its input, attention its inputs, output and log-sum-exps. Counted
for full packs in which every text token has a label. A test compares the sums with what torch's
allocator hands out (tests/golden/device_memory.json).
"""

from dataclasses import dataclass
from functools import cached_property

from megatron_dattn.attention import AttentionConfig
from megatron_dattn.attention.layers import LayerRule, layer_rules
from megatron_dattn.attention.visual_config import num_shared
from megatron_dattn.models.config import ModelConfig
from megatron_dattn.models.execution import ExecutionConfig
from megatron_dattn.parallel.config import ParallelConfig
from megatron_dattn.planner.parameters import attention_widths

VALUE_BYTES = {"bf16": 2, "fp32": 4}
FP32 = 4


@dataclass(frozen=True)
class PackSize:
    """What of a micro-batch decides its activations."""

    visual_tokens: int
    text_tokens: int
    """Both with padding: the token budgets."""
    images: int


@dataclass(frozen=True)
class Setup:
    """A rank's share of the work, as its activations depend on it."""

    config: ModelConfig
    parallel: ParallelConfig
    execution: ExecutionConfig
    pack: PackSize
    trained: frozenset[str]

    @property
    def value(self) -> int:
        """Bytes of one value."""
        return VALUE_BYTES[self.execution.precision]

    @property
    def tensor(self) -> int:
        return self.parallel.tensor_model_parallel_size

    @property
    def token_ranks(self) -> int:
        """Ranks over which norms and residuals share the tokens."""
        return self.tensor if self.parallel.sequence_parallel else 1

    @property
    def preset(self) -> AttentionConfig:
        return self.config.preset

    @cached_property
    def rules(self) -> tuple[LayerRule, ...]:
        layers, savings = self.config.language.num_hidden_layers, self.execution.savings
        return layer_rules(self.preset, layers, skip_unread=savings.unread_tokens)

    @property
    def keeps_activations(self) -> bool:
        """True if norms' outputs and FFN activations wait for the gradients of weights."""
        trained = "language_model" in self.trained
        return trained and self.execution.recompute != "selective"

    def hidden(self, tokens: int) -> int:
        """Bytes of local tokens, [tokens / token ranks, d]."""
        return tokens * self.config.language.hidden_size * self.value // self.token_ranks

    def cut(self, tokens: int, width: int) -> int:
        """Bytes of all tokens' values of this rank's heads or neurons, [tokens, width / ranks]."""
        return tokens * width * self.value // self.tensor


def decoder_layer(setup: Setup, number: int) -> int:
    """Bytes that decoder layer `number`, counted from 0, keeps."""
    pack, rule = setup.pack, setup.rules[number]
    tokens = pack.text_tokens + pack.visual_tokens * rule.sees_images
    following = setup.rules[number + 1 : number + 2]
    reads_images = any(rule.sees_images for rule in following)
    unread = setup.execution.savings.unread_tokens and not setup.preset.visual_tokens_predict
    emitted = tokens if reads_images or not (following or unread) else pack.text_tokens
    output = setup.hidden(emitted)  # [emitted, d]: the next norm's input
    if setup.execution.recompute == "full":
        return output
    return _attention(setup, rule, tokens) + _ffn(setup, rule) + output


def _attention(setup: Setup, rule: LayerRule, tokens: int) -> int:
    language, savings = setup.config.language, setup.execution.savings
    query, key_value = attention_widths(language)
    text, attention = setup.pack.text_tokens, rule.attention
    scored = tokens if attention.scores_visual_tokens else text
    apart = savings.visual_queries and scored < tokens
    kept = setup.hidden(tokens) * setup.keeps_activations  # [tokens, d]: the norm's output
    kept += setup.cut(scored if apart else tokens, query)  # queries
    kept += setup.cut(tokens, 2 * key_value)  # keys, values
    if not apart and setup.token_ranks == 1:
        # Keys and values are views of the product [queries, keys, values], which is kept whole.
        kept += setup.cut(tokens, query)
    if language.has_qk_norms:  # what the norms read, besides what they write
        kept += setup.cut(scored, query) + setup.cut(tokens, key_value)
    softmaxes = 1 if attention.merge in ("alpha", "cascade") else 2
    kept += softmaxes * setup.cut(scored, query)  # their outputs
    kept += softmaxes * scored * language.num_attention_heads * FP32 // setup.tensor  # log-sum-exps
    if attention.v2v == "diagonal" and rule.sees_images:
        if savings.folded_output:
            kept += setup.cut(language.hidden_size, key_value)  # the folded weight, [d, e]
        elif "language_model" in setup.trained:
            kept += setup.cut(tokens, query)  # the projection's input, with values repeated
    if attention.merge == "cascade" and rule.sees_images:  # the cross-attention's own
        kept += setup.hidden(tokens + 2 * text)  # tokens joined; text and its norm's output
        kept += setup.cut(text, 2 * query) + setup.cut(setup.pack.visual_tokens, 2 * key_value)
    if language.has_post_norms:
        kept += _norm_input(setup, tokens if attention.outputs_visual_tokens else text)
    return kept


def _ffn(setup: Setup, rule: LayerRule) -> int:
    """Of the tokens that pass it; visual tokens may pass a share."""
    visual, text = setup.pack.visual_tokens * rule.sees_images, setup.pack.text_tokens
    language = setup.config.language
    if rule.visual_ffn == 1.0:
        return _whole_ffn(setup, visual + text)
    width = num_shared(language.intermediate_size, rule.visual_ffn) if rule.visual_ffn else 0
    kept = _whole_ffn(setup, text)
    if width:
        kept += _norm_input(setup, visual)
        if not setup.execution.savings.ffn_chunk_tokens:
            # [visual, d], gathered, both products' input; gate, the same activated, up, product.
            kept += visual * language.hidden_size * setup.value + setup.cut(visual, 4 * width)
    return kept


def _whole_ffn(setup: Setup, tokens: int) -> int:
    language = setup.config.language
    kept = _norm_input(setup, tokens)
    if not setup.execution.savings.ffn_chunk_tokens:  # else recomputed from the norm's input
        kept += setup.hidden(tokens) * setup.keeps_activations  # [tokens, d]: the norm's output
        kept += _ffn_middle(setup, tokens)
        if language.has_post_norms:
            kept += _norm_input(setup, tokens)
    return kept


def _ffn_middle(setup: Setup, tokens: int) -> int:
    """Gate and up, [tokens, 2f], and their product, [tokens, f]."""
    language = setup.config.language
    width = (2 + setup.keeps_activations) * language.intermediate_size
    if language.hidden_activation != "silu":
        width += language.intermediate_size  # not fused: the activated gate, too
    return setup.cut(tokens, width)


def _norm_input(setup: Setup, tokens: int) -> int:
    """[tokens, d]; in fp32 where the norm computes in it as a whole, as Gemma's does."""
    kept = setup.hidden(tokens)
    return kept * FP32 // setup.value if setup.config.language.zero_centred_norms else kept


def decoder_layer_at_work(setup: Setup, number: int) -> int:
    """Bytes that the backward pass of a layer holds besides what the layer keeps.

    In the FFN, where it is most. Either the gradient of the layer's output, [tokens, d], is
    gathered and gives that of the FFN's product, [tokens, f], and of the second weight, [d, f]; or,
    after that, the product's gradient gives that of gate and up, [tokens, 2f], and the product is
    gone.
    """
    pack, rule, language = setup.pack, setup.rules[number], setup.config.language
    visual = pack.visual_tokens * rule.sees_images * (rule.visual_ffn > 0)
    tokens = visual + pack.text_tokens
    width, trained = language.intermediate_size, "language_model" in setup.trained
    again = decoder_layer_again(setup, number)
    chunk = setup.execution.savings.ffn_chunk_tokens
    output = setup.hidden(tokens)
    if 0 < chunk < tokens:
        again += setup.hidden(chunk) * setup.keeps_activations + _ffn_middle(setup, chunk)
        tokens = chunk
    product = setup.cut(tokens, width)
    refilled = (trained and not setup.keeps_activations) * product
    gathered = setup.hidden(tokens) * setup.token_ranks if setup.token_ranks > 1 else 0
    of_weight = trained * setup.cut(language.hidden_size, width)
    first = gathered + product + of_weight + refilled
    second = 3 * product - (product if setup.keeps_activations else 0)
    return again + output + max(first, second)


def decoder_layer_again(setup: Setup, number: int) -> int:
    """Bytes that full recomputation makes of one layer once more."""
    if setup.execution.recompute != "full":
        return 0
    pack, rule = setup.pack, setup.rules[number]
    tokens = pack.text_tokens + pack.visual_tokens * rule.sees_images
    return _attention(setup, rule, tokens) + _ffn(setup, rule)


def encoder(setup: Setup) -> int:
    """Pixels, and what the vision encoder and the adapter keep.

    A frozen encoder keeps its features alone. A trained one, per patch of every layer: inputs and
    outputs of both norms (4d); queries, keys, values and attention's output (4d) with its
    log-sum-exps; both sides of the FFN's activation (2f). Under full recomputation a layer's input.
    """
    vision = setup.config.vision
    d, f = vision.hidden_size, vision.intermediate_size
    tensor, images = setup.tensor, setup.pack.images
    if setup.execution.encoder_tp_mode == "data":  # a share of the images, the whole encoder
        tensor, images = 1, -(-images // tensor)
    patches = images * vision.num_places
    kept = setup.pack.images * 3 * vision.image_size**2 * FP32
    if "vision_model" not in setup.trained:
        return kept + _adapter(setup)
    layer = patches * d * setup.value
    if setup.execution.recompute != "full":
        layer *= 4
        layer += patches * (4 * d + 2 * f) * setup.value // tensor
        layer += patches * vision.num_attention_heads * FP32 // tensor
    kept += patches * (3 * vision.patch_size**2 + d) * setup.value  # the patch embedding's sides
    return kept + vision.num_used_layers * layer + _adapter(setup)


def _adapter(setup: Setup) -> int:
    """Per token: the features; the first norm's output; both sides of the GELU; what a norm behind
    reads; the output, which joins the decoder's tokens, without an adapter the features do."""
    config, vision = setup.config, setup.config.vision
    per_token = config.language.hidden_size
    if setup.preset.visual.source != "reproject":
        middle = config.adapter.hidden_size or config.language.hidden_size
        per_token += vision.hidden_size + 2 * middle // setup.tensor
        before, behind = (config.adapter_norm in (place, "both") for place in ("before", "behind"))
        norms_behind = behind + (config.visual_embedding == "fractional")
        per_token += before * vision.hidden_size + norms_behind * config.language.hidden_size
    return setup.pack.images * config.tokens_per_image * setup.value * per_token


def head(setup: Setup) -> int:
    """At the loss: the final norm's output, the labelled tokens on every rank, and their logits.

    One rank's cross entropy holds three fp32 tensors of logits in its backward pass, the one over
    ranks in place one, beside the logits.
    """
    text, width = setup.pack.text_tokens, setup.config.language.hidden_size
    vocabulary = setup.config.language.padded_vocab_size // setup.tensor
    per_logit = 3 * FP32 if setup.tensor == 1 else setup.value + FP32
    return setup.hidden(text) + text * width * setup.value + text * vocabulary * per_logit


def buffers(setup: Setup) -> int:
    """Bytes that stay between steps or for a whole one, whatever is kept: rotary tables, fp32
    [tokens, head_dim] twice, what megatron-core gathers tokens into, [tokens, d], and cuBLAS's
    workspace."""
    tokens = setup.pack.visual_tokens + setup.pack.text_tokens
    gathered = setup.hidden(tokens) * setup.token_ranks if setup.token_ranks > 1 else 0
    return 2 * tokens * setup.config.language.head_dim * FP32 + gathered + CUBLAS_WORKSPACE


CUBLAS_WORKSPACE = 32 * 2**20
"""torch's setting for compute capability 9.0; others have less."""
