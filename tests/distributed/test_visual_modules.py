"""What surrounds the decoder layers in some presets, cut over two ranks: the same results."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_dattn.models.adapter import VisualProjector, build_adapter
from megatron_dattn.models.config import AdapterConfig, VisionConfig
from megatron_dattn.models.execution import ExecutionConfig
from megatron_dattn.models.layer_specs import vision_block_spec
from megatron_dattn.models.transformer_config import (
    language_transformer_config,
    vision_transformer_config,
)
from megatron_dattn.models.vision_encoder import VisionEncoder
from megatron_dattn.parallel.config import ParallelConfig
from tests.support.distributed import run_distributed
from tests.support.megatron import init_model_parallel
from tests.support.vlm import (
    CLIP,
    LANGUAGE,
    VISION,
    fill_parameters,
    join_shards,
    partition_of,
    tiny_model_config,
)

TOKENS = 6
# Name -> this rank's gradient, the axis it is cut along, its stride.
Gradients = dict[str, tuple[Tensor, int | None, int]]


def _project(tensor: int, sequence_parallel: bool) -> tuple[Tensor, Tensor, Gradients]:
    """This rank's tokens, the gradient of its input, and its gradients, summed where partial."""
    init_model_parallel(tensor)
    parallel = ParallelConfig(
        tensor_model_parallel_size=tensor, sequence_parallel=sequence_parallel
    )
    config = language_transformer_config(LANGUAGE, parallel, ExecutionConfig(precision="fp32"))
    projector = VisualProjector(config, feature_size=VISION.hidden_size, norm_eps=1e-5)
    projector.share_embeddings_and_output_weights = False
    fill_parameters(projector)
    generator = torch.Generator().manual_seed(3)
    tokens, weights = torch.randn(2, TOKENS, 1, LANGUAGE.hidden_size, generator=generator)
    if sequence_parallel:
        rank = parallel_state.get_tensor_model_parallel_rank()
        tokens, weights = tokens.chunk(tensor)[rank], weights.chunk(tensor)[rank]
    tokens = tokens.clone().requires_grad_()
    projected = projector(tokens)
    (projected * weights).sum().backward()
    gradients: Gradients = {}
    for name, parameter in projector.named_parameters():
        if getattr(parameter, "sequence_parallel", False):  # as megatron-core's finalization does
            dist.all_reduce(parameter.grad)
        gradients[name] = (parameter.grad, *partition_of(parameter))
    return projected.detach(), tokens.grad, gradients


def _adapt(tensor: int) -> tuple[Tensor, Tensor, Gradients]:
    """Tokens of an adapter with all that it can have, and the gradients of features and weights."""
    init_model_parallel(tensor)
    parallel = ParallelConfig(tensor_model_parallel_size=tensor, sequence_parallel=tensor > 1)
    settings = AdapterConfig(norm="both", visual_position="per_patch", num_places=4)
    config = vision_transformer_config(VISION, parallel, ExecutionConfig(precision="fp32"))
    adapter = build_adapter(config, replace(tiny_model_config(), adapter=settings))
    assert adapter is not None
    adapter.share_embeddings_and_output_weights = False
    fill_parameters(adapter)
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(2, 9, VISION.hidden_size, generator=generator, requires_grad=True)
    weights = torch.randn(18, LANGUAGE.hidden_size, generator=generator)
    tokens = adapter(features, VISION.grid)
    (tokens * weights).sum().backward()
    gradients: Gradients = {
        name: (parameter.grad, *partition_of(parameter))
        for name, parameter in adapter.named_parameters()
    }
    assert not any(getattr(p, "sequence_parallel", False) for p in adapter.parameters())
    return tokens.detach(), features.grad, gradients


def _encode(tensor: int, vision: VisionConfig, tp_mode: str) -> tuple[Tensor, Tensor]:
    """Features of three images and the attention that their patches receive."""
    init_model_parallel(tensor)
    parallel = ParallelConfig(tensor_model_parallel_size=tensor)
    execution = ExecutionConfig(precision="fp32", encoder_tp_mode=tp_mode)  # type: ignore[arg-type]
    config = vision_transformer_config(vision, parallel, execution)
    encoder = VisionEncoder(config, vision, vision_block_spec("local", config.num_layers))
    encoder.share_embeddings_and_output_weights = False
    fill_parameters(encoder)
    generator = torch.Generator().manual_seed(4)
    pixels = torch.randn(3, 3, VISION.image_size, VISION.image_size, generator=generator)
    with torch.no_grad():
        features, received = encoder(pixels, with_attention=True)
    return features, received


@pytest.mark.parametrize("tp_mode", ["data", "weights"])
@pytest.mark.parametrize("vision", [VISION, CLIP], ids=["siglip", "clip"])
def test_encoder_equals_one_process(vision: VisionConfig, tp_mode: str) -> None:
    ((features, received),) = run_distributed(_encode, 1, 1, vision, tp_mode)
    first, second = run_distributed(_encode, 2, 2, vision, tp_mode)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])  # all ranks must keep the same patches
    # fp32 sums in another order.
    torch.testing.assert_close(first[0], features, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first[1], received, rtol=1e-5, atol=1e-6)
    assert received.std() > 1e-3  # so that the heads of one rank alone would differ


def test_adapter_equals_one_process() -> None:
    """Its tokens and its norms are whole on every rank, also under sequence parallelism."""
    ((expected, input_gradient, whole),) = run_distributed(_adapt, 1, 1)
    ranks = run_distributed(_adapt, 2, 2)
    assert {"norm.weight", "output_norm.weight", "positions.patches"} <= whole.keys()
    for rank in ranks:
        # fp32 sums in another order.
        torch.testing.assert_close(rank[0], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(rank[1], input_gradient, rtol=1e-4, atol=1e-5)
    for name, (gradient, *_) in whole.items():
        shards, (_, axis, stride) = [rank[2][name][0] for rank in ranks], ranks[0][2][name]
        joined = join_shards(shards, axis, stride)
        torch.testing.assert_close(joined, gradient, rtol=1e-4, atol=1e-5, msg=name)
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_projector_equals_one_process(sequence_parallel: bool) -> None:
    ((expected, input_gradient, whole),) = run_distributed(_project, 1, 1, False)
    ranks = run_distributed(_project, 2, 2, sequence_parallel)
    for index, one_process in ((0, expected), (1, input_gradient)):
        parts = [rank[index] for rank in ranks]
        joined = torch.cat(parts) if sequence_parallel else parts[0]
        # fp32 sums in another order.
        torch.testing.assert_close(joined, one_process, rtol=1e-5, atol=1e-5)
    for name, (gradient, *_) in whole.items():
        shards, (_, axis, stride) = [rank[2][name][0] for rank in ranks], ranks[0][2][name]
        joined = join_shards(shards, axis, stride)
        torch.testing.assert_close(joined, gradient, rtol=1e-4, atol=1e-5, msg=name)
        assert gradient.abs().max() > 0, name
