"""The modules that megatron-core wraps: norms and parallel linear layers.

A linear layer gathers and reduces tokens itself, as the real one does, and under `fp8_autocast`
refuses sizes as that does; `fp8_meta` is then no longer empty.
"""

import pickle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transformer_engine.pytorch.fp8 import FP8GlobalStateManager, assert_dim_for_fp8_exec


class _Norm(torch.nn.Module):
    def __init__(
        self,
        normalized_shape: int | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        device: Any = "cuda",
    ) -> None:
        super().__init__()
        size = normalized_shape or hidden_size
        factory = {"dtype": params_dtype, "device": device}
        start = torch.zeros if zero_centered_gamma else torch.ones
        self.eps, self.shift = eps, float(zero_centered_gamma)
        self.weight = torch.nn.Parameter(start(size, **factory))
        self.weight.sequence_parallel = sequence_parallel
        self.bias = None
        if type(self) is LayerNorm:
            self.bias = torch.nn.Parameter(torch.zeros(size, **factory))
            self.bias.sequence_parallel = sequence_parallel

    def forward(self, states: Tensor) -> Tensor:
        weight = self.weight + self.shift
        return _normalize(states, weight, self.bias, self.eps, type(self).__name__)

    # Norms are operations of its `ops` and have a state like these, though never anything in it.
    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        assert state is None or state.numel() == 0


class RMSNorm(_Norm):
    pass


class LayerNorm(_Norm):
    pass


class Linear(torch.nn.Module):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        rng_tracker_name: str | None = None,
        init_method: Any = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: Any = "cuda",
        save_original_input: bool = False,
    ) -> None:
        super().__init__()
        from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes

        assert not fuse_wgrad_accumulation, "a weight of ours that is used twice would lose one"
        self.parallel_mode, self.tp_group = parallel_mode, tp_group
        self.tp_size = tp_size if tp_group is None else tp_group.size()
        self.in_features = in_features // (self.tp_size if parallel_mode == "row" else 1)
        self.out_features = out_features // (self.tp_size if parallel_mode == "column" else 1)
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        self.use_bias, self.return_bias = bias, return_bias
        self.save_original_input = save_original_input
        self.fp8_meta: dict[str, Any] = {}
        self._copy: Tensor | None = None
        factory = {"dtype": params_dtype, "device": device}
        self.weight = torch.nn.Parameter(
            torch.empty(self.out_features, self.in_features, **factory)
        )
        if init_method is not None:
            init_method(self.weight.data)
        axis = 1 if parallel_mode == "row" else 0
        set_tensor_model_parallel_attributes(self.weight, True, axis, 1)
        if not bias:
            self.bias = torch.empty(0, **factory)
            return
        self.bias = torch.nn.Parameter(torch.zeros(self.out_features, **factory))
        if parallel_mode == "column":
            set_tensor_model_parallel_attributes(self.bias, True, 0, 1)
        elif parallel_mode == "row":
            self.bias.sequence_parallel = self.sequence_parallel

    def _normalized(self, states: Tensor) -> Tensor:
        return states

    def forward(self, states: Tensor, is_first_microbatch: bool | None = None) -> Any:
        from megatron.core.tensor_parallel import mappings

        states.view(-1, self.in_features)  # as it begins there; no other strides are taken
        states = self._normalized(states)
        weight = self._meet_fp8(states, is_first_microbatch)
        group = self.tp_group
        if self.parallel_mode == "column":
            if self.sequence_parallel:
                states = mappings.gather_from_sequence_parallel_region(states, group=group)
            elif self.tp_size > 1:
                states = mappings.copy_to_tensor_model_parallel_region(states, group=group)
        apply_now = self.use_bias and not self.return_bias
        if self.parallel_mode == "row":
            out = F.linear(states, weight)
            if self.sequence_parallel:
                out = mappings.reduce_scatter_to_sequence_parallel_region(out, group=group)
            elif self.tp_size > 1:
                out = mappings.reduce_from_tensor_model_parallel_region(out, group=group)
            out = out + self.bias if apply_now else out
        else:
            out = F.linear(states, weight, self.bias if apply_now else None)
        return (out, self.bias) if self.return_bias else out

    def _meet_fp8(self, states: Tensor, is_first_microbatch: bool | None) -> Tensor:
        """The weight; under FP8 what that asks of the sizes, and the state that it keeps."""
        recipe = FP8GlobalStateManager.get_fp8_recipe()
        if recipe is None:
            return self.weight
        assert_dim_for_fp8_exec(states, self.weight)
        tokens = states.shape[:-1].numel()
        if self.parallel_mode == "column" and self.sequence_parallel:
            tokens *= self.tp_size
        if tokens % 16 and self.weight.requires_grad and torch.is_grad_enabled():
            # cublasLt sums over the tokens for the weight's gradient.
            raise RuntimeError(f"leading dimension requirement for FP8 GEMM: {tokens} tokens")
        self.fp8_meta["recipe"] = recipe
        if recipe.delayed():
            assert not self.save_original_input, "delayed scaling has quantized it before"
            history = self.fp8_meta.setdefault(
                "amax_history_fwd", torch.zeros(recipe.amax_history_len, 3)
            )
            history[0, 0] = states.detach().abs().max()
            self.fp8_meta["scale_fwd"] = recipe.fp8_format.value[0] / history.amax(0).clamp(min=1)
        # Its FP8 copy is made anew with the first micro-batch alone, or where nobody says which.
        if is_first_microbatch is not False or self._copy is None:
            self._copy = self.weight.detach().clone()
        return self.weight + (self._copy - self.weight).detach()

    def get_extra_state(self) -> Tensor:
        if "recipe" not in self.fp8_meta:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(bytearray(pickle.dumps(self.fp8_meta)), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        """As from 2.16.1 on: a pickle is no longer loaded."""
        if state is not None and state.numel():
            raise RuntimeError("Refusing to load pickled Transformer Engine extra state")


class LayerNormLinear(Linear):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        normalization: str = "LayerNorm",
        return_layernorm_output: bool = False,
        zero_centered_gamma: bool = False,
        **linear: Any,
    ) -> None:
        super().__init__(in_features, out_features, **linear)
        assert not return_layernorm_output
        self.eps, self.normalization, self.shift = eps, normalization, float(zero_centered_gamma)
        factory = {"dtype": self.weight.dtype, "device": self.weight.device}
        start = torch.zeros if zero_centered_gamma else torch.ones
        self.layer_norm_weight = torch.nn.Parameter(start(in_features, **factory))
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel
        self.layer_norm_bias = None
        if normalization == "LayerNorm":
            self.layer_norm_bias = torch.nn.Parameter(torch.zeros(in_features, **factory))
            self.layer_norm_bias.sequence_parallel = self.sequence_parallel

    def _normalized(self, states: Tensor) -> Tensor:
        weight = self.layer_norm_weight + self.shift
        return _normalize(states, weight, self.layer_norm_bias, self.eps, self.normalization)


def _normalize(
    states: Tensor, weight: Tensor, bias: Tensor | None, eps: float, normalization: str
) -> Tensor:
    if normalization == "RMSNorm":
        return F.rms_norm(states, weight.shape, weight, eps)
    return F.layer_norm(states, weight.shape, weight, bias, eps)
