"""A tiny Mistral that knows the demo's language but has never seen a picture.

The model is transformers' own `MistralForCausalLM` with every trait of the large one (grouped
queries, RMSNorm, SwiGLU, rotary positions, untied embeddings). It is pretrained as a plain language
model on captions and conversations of random scenes, so it learns the words and the instruction
format, and can only guess at what it cannot see.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerBase

from examples.quickstart.corpus import language_texts

SEQUENCE_LENGTH = 128


def language_config(tokenizer: PreTrainedTokenizerBase) -> MistralConfig:
    """The decoder's shape: four 128-wide layers, four query heads sharing two key heads."""
    return MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        sliding_window=None,
        # About hidden_size ** -0.5: with the usual 0.02 so narrow a model starts almost silent.
        initializer_range=0.08,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def token_batches(
    tokenizer: PreTrainedTokenizerBase, grid: int, batch_size: int, seed: int
) -> Iterator[Tensor]:
    """Endless int64 [batch_size, SEQUENCE_LENGTH]: documents one after another, cut to length."""
    texts = language_texts(seed, grid)
    stock: list[int] = []
    needed = batch_size * SEQUENCE_LENGTH
    while True:
        while len(stock) < needed:
            document = tokenizer.bos_token + next(texts)
            stock += tokenizer(document, add_special_tokens=False).input_ids
        yield torch.tensor(stock[:needed]).view(batch_size, SEQUENCE_LENGTH)
        del stock[:needed]


def pretrain_language(
    tokenizer: PreTrainedTokenizerBase,
    grid: int = 2,
    seed: int = 0,
    num_steps: int = 200,
    batch_size: int = 16,
    peak_lr: float = 3e-3,
    log_every: int = 50,
) -> MistralForCausalLM:
    """Make and train the language model; prints its loss per token as it goes."""
    torch.manual_seed(seed)
    model = MistralForCausalLM(language_config(tokenizer))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=peak_lr, weight_decay=0.1, betas=(0.9, 0.95)
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=peak_lr, total_steps=num_steps, pct_start=0.1
    )
    model.train()
    batches = token_batches(tokenizer, grid, batch_size, seed)
    for step in range(1, num_steps + 1):
        input_ids = next(batches)
        loss = model(input_ids=input_ids, labels=input_ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % log_every == 0 or step == num_steps:
            print(f"language step {step}/{num_steps}: loss {loss.item():.3f}")
    return model.eval()
