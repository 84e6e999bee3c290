"""Delayed-scaling state of FP8 as plain tensors, of the fused layers (`delayed_scales`) or of Transformer Engine's modules.

Transformer Engine keeps its own in pickled `_extra_state`, which it no longer reads by default (2.20), and which a checkpoint of tensors
has no place for. The live tensors stand in `FP8GlobalStateManager.quantization_state` in the order of first use, which is that
of the model's layers; they exist after the first forward and backward.
"""

import importlib.util
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from yxanul_nemo.config.training import PrecisionConfig

PREFIX = "fp8."


def scaling_tensors(model: MegatronModule) -> Iterator[tuple[str, Tensor]]:
    """Name and live tensor of every amax history and scale; nothing under recipes without state.

    Fused layers have few, of all layers together. Those of modules are many:

    Attention cores are counted apart: only some lengths go through Transformer Engine's, and a phase's names must be those of the
    phase before it. Where they don't compute in FP8, theirs are left out.
    """
    if (scales := getattr(model.decoder, "scales", None)) is not None:
        yield from ((f"{PREFIX}layers.{name}", tensor) for name, tensor in scales.tensors().items())
        return
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    state = FP8GlobalStateManager.quantization_state
    if not state.global_amax_history_buffer:
        return
    of_attention = set(_attention_tensors(model))
    for kind, buffers in (("amax_history", state.global_amax_history_buffer), ("scale", state.global_scale_buffer)):
        for key, tensors in buffers.items():
            direction = "forward" if key.startswith("forward") else "backward"
            products = [tensor for tensor in tensors if tensor.data_ptr() not in of_attention]
            for i, tensor in enumerate(products):
                yield f"{PREFIX}{direction}.{i}.{kind}", tensor
            if model.config.fp8_dot_product_attention:
                cores = [tensor for tensor in tensors if tensor.data_ptr() in of_attention]
                for i, tensor in enumerate(cores):
                    yield f"{PREFIX}attention.{direction}.{i}.{kind}", tensor


def _attention_tensors(model: MegatronModule) -> Iterator[int]:
    """Where the scaling tensors of attention cores lie in memory."""
    from transformer_engine.pytorch import DotProductAttention

    for module in model.modules():
        if isinstance(module, DotProductAttention):
            for direction in ("scaling_fwd", "scaling_bwd"):
                if direction in module.fp8_meta:
                    yield module.fp8_meta[direction].amax_history.data_ptr()
                    yield module.fp8_meta[direction].scale.data_ptr()


def sharded_fp8_state(model: MegatronModule) -> dict[str, ShardedTensor]:
    """The state as Megatron-core's sharded tensors; ranks hold equal values, as amax is reduced over them."""
    replica = min(1, dist.get_rank())
    return {
        name: ShardedTensor.from_rank_offsets(name, tensor, replica_id=replica)
        for name, tensor in scaling_tensors(model)
    }


def forget_fp8_state() -> None:
    """Drop the state of all models of this process, where a new one is to begin with none. Nothing without Transformer Engine."""
    if importlib.util.find_spec("transformer_engine") is None:
        return
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    FP8GlobalStateManager.reset()
    # Megatron-core writes its choice of attention into these and refuses another one in the same process.
    for variable in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        os.environ.pop(variable, None)


def without_absent_scales(state: Mapping[str, Any], present: Collection[str]) -> dict[str, Any]:
    """`state` less the scaling tensors where a checkpoint has none at all: an imported one, or one of training in another precision.

    Args:
        present: names of the tensors in the checkpoint. If it has some scaling tensors of the state's kind, fused layers' or modules', the
            state stays whole, so that a damaged checkpoint, or one of another number of layers, is still refused.
    """
    kinds = {_is_of_fused_layers(name) for name in state if name.startswith(PREFIX)}
    if any(name.startswith(PREFIX) and _is_of_fused_layers(name) in kinds for name in present):
        return dict(state)
    return {name: value for name, value in state.items() if not name.startswith(PREFIX)}


def _is_of_fused_layers(name: str) -> bool:
    return name.startswith(f"{PREFIX}layers.")


@contextmanager
def scaling_state_kept(model: MegatronModule, precision: PrecisionConfig) -> Iterator[None]:
    """Put the state back at the end of the block: a forward pass in it, also without gradients, notes largest values of its own."""
    kept = [(tensor, tensor.clone()) for _, tensor in scaling_tensors(model)] if precision.is_fp8 else []
    try:
        yield
    finally:
        for tensor, before in kept:
            tensor.copy_(before)
