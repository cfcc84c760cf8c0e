"""Visual tokens of a new adapter start at the scale of the token embeddings that a stage loads."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_dattn.checkpoint import save_checkpoint
from megatron_dattn.config.pretrain import PretrainConfig
from megatron_dattn.config.training import CheckpointConfig
from megatron_dattn.models.vlm import DAttnVLM
from megatron_dattn.training.checkpoint import Checkpointer
from tests.support.distributed import run_distributed
from tests.support.training import build_run, leave, training_config
from tests.support.vlm import tiny_model_config

TOKENIZER = "0" * 64
SCALE = 0.37
# The second rank has one token of these, and 63 tokens of none.
VOCABULARY = 65


def _config(tensor: int, attention: str, **adapter: object) -> PretrainConfig:
    config = training_config(tensor=tensor)
    model = tiny_model_config(attention, vocab_size=VOCABULARY)
    settings = replace(model.adapter, **adapter)
    return replace(config, model=replace(model, adapter=settings))


def _starts_at(folder: str, tensor: int, attention: str, adapter: dict) -> tuple[float, float]:
    """The deviation of the tokens' embeddings in a conversion, and the last norm's weight in a
    stage that starts from it."""
    source = build_run(_config(tensor, "dattn"), [])
    model = unwrap_model(source.state.model)
    table = model.language_model.embedding.word_embeddings.weight
    with torch.no_grad():
        table.mul_(SCALE / 0.1)
        first = parallel_state.get_tensor_model_parallel_rank() * len(table)
        table[max(0, VOCABULARY - first) :] = 100.0  # rows behind the vocabulary
    shards = {
        key: shard
        for key, shard in model.sharded_state_dict().items()
        if not key.startswith("adapter")
    }
    facts = {"model": asdict(model.model_config), "modules": ["vision_model", "language_model"],
             "tokenizer": TOKENIZER, "stage": "import", "step": 0}  # fmt: skip
    save_checkpoint(Path(folder), 0, {"model": shards}, facts=facts)
    whole = _gathered(table)[:VOCABULARY].double()
    leave()
    config = _config(tensor, attention, **adapter)
    run = build_run(config, [])
    checkpointer = Checkpointer(
        CheckpointConfig(), model=asdict(config.model), tokenizer=TOKENIZER, stage="stage1"
    )
    checkpointer.load_weights(run.state, folder)
    model = unwrap_model(run.state.model)
    assert isinstance(model, DAttnVLM)
    assert model.adapter is not None
    assert model.adapter.last_norm is not None
    weight = model.adapter.last_norm.weight
    assert weight.eq(weight[0]).all()
    return whole.std(correction=0).item(), weight[0].item()


def _gathered(table: Tensor) -> Tensor:
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(table) for _ in range(group.size())]
    torch.distributed.all_gather(parts, table.detach(), group=group)
    return torch.cat(parts)


@pytest.mark.parametrize(
    ("attention", "adapter"), [("vidi", {}), ("dattn", {"norm": "behind"})], ids=str
)
def test_the_last_norm_starts_at_the_deviation_of_the_embeddings(
    tmp_path: Path, attention: str, adapter: dict[str, object]
) -> None:
    for expected, started in run_distributed(_starts_at, 2, str(tmp_path), 2, attention, adapter):
        assert expected == pytest.approx(SCALE, rel=0.1), "a value that no setting has"
        assert started == pytest.approx(expected, rel=1e-6)
