"""Train the demo's sentencepiece tokenizer and save it as a Hugging Face fast tokenizer.

    python -m examples.quickstart.make_tokenizer --output outputs/quickstart/tokenizer

The layout of the vocabulary is that of Mistral-7B-v0.3, only smaller: `<unk>`, `<s>`, `</s>`, the
control tokens `[INST]` = 3 and `[/INST]` = 4 and further ones, among them reserved `[control_N]`
entries that stand for nothing yet, then 256 bytes for whatever has no piece, then the pieces.
The folder holds sentencepiece's own `tokenizer.model` and the `tokenizer.json` made from it.
"""

import io
import sys
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken
from transformers import LlamaTokenizer

from examples.quickstart.corpus import sentences
from examples.quickstart.scenes import PLACE_NAMES
from megatron_dattn.errors import EXIT_USER_ERROR, DataError, UserError
from megatron_dattn.runtime.tool import ToolParser

CONTROL_TOKENS = (
    *("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    *(f"[control_{number}]" for number in range(8, 14)),
)
VOCAB_SIZE = 448
NUM_SCENES = 2000


def train_sentencepiece(seed: int, grid: int, vocab_size: int) -> bytes:
    """Train a byte-pair model with byte fallback on the demo's sentences; its file as bytes."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(seed, grid, NUM_SCENES),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            control_symbols=list(CONTROL_TOKENS),
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            character_coverage=1.0,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(
            f"sentencepiece cannot make a vocabulary of {vocab_size} entries from the demo's "
            f"text: {error}"
        ) from error
    return model.getvalue()


def merges_of(vocab: dict[str, int]) -> list[tuple[str, str]]:
    """The merges that build each piece, in the order of the pieces' ids (which is their rank).

    sentencepiece keeps no list of merges: a pair of known pieces is merged when together they are
    a piece. Splits of one piece are ordered by the ids of their halves.
    """
    merges = []
    for piece, _ in sorted(vocab.items(), key=lambda item: item[1]):
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [pair for pair in halves if pair[0] in vocab and pair[1] in vocab]
        merges += sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    return merges


def to_hugging_face(model: bytes) -> LlamaTokenizer:
    """The fast tokenizer that encodes like the sentencepiece model.

    As in Mistral's own conversion: no normalisation, a space before the first word of a text,
    control tokens recognised in text.
    """
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocab = {pieces.id_to_piece(index): index for index in range(pieces.get_piece_size())}
    plain = {
        piece: index
        for piece, index in vocab.items()
        if not (pieces.is_control(index) or pieces.is_byte(index) or pieces.is_unknown(index))
    }
    return LlamaTokenizer(
        vocab=vocab,
        merges=merges_of(plain),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=[
            AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS
        ],
        add_bos_token=True,
        add_prefix_space=True,
        legacy=False,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


def make_tokenizer(
    output: Path, seed: int = 0, grid: int = 2, vocab_size: int = VOCAB_SIZE
) -> LlamaTokenizer:
    """Train, convert and save; returns the tokenizer."""
    model = train_sentencepiece(seed, grid, vocab_size)
    tokenizer = to_hugging_face(model)
    output.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(output)
    (output / "tokenizer.model").write_bytes(model)
    return tokenizer


def main() -> int:
    """Command line; returns the exit code."""
    parser = ToolParser((__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--grid", type=int, default=2, choices=sorted(PLACE_NAMES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE)
    options = parser.parse_args()
    try:
        tokenizer = make_tokenizer(options.output, options.seed, options.grid, options.vocab_size)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    print(f"{options.output}: a tokenizer of {len(tokenizer)} entries")
    return 0


if __name__ == "__main__":
    sys.exit(main())
