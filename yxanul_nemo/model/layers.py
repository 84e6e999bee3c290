"""Layer specs: which modules Megatron-core's transformer block is made of, on a GPU and on a CPU.

`te` is Megatron-core's own Transformer Engine spec. `torch` is its local spec with the pieces that insist on a CUDA device
replaced (megatron-core 0.19: RotaryEmbedding.get_emb, DotProductAttention and the final norm when Transformer Engine is importable).
"""

import dataclasses

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_submodules,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.distributed import ProcessGroup


class TorchCoreAttention(MegatronModule):
    """Core attention on any device through torch's scaled_dot_product_attention, with grouped keys and values."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: object,
    ):
        super().__init__(config=config)
        assert config.context_parallel_size == 1, "context parallelism needs Transformer Engine"
        self.softmax_scale = softmax_scale
        self.is_causal = attn_mask_type == AttnMaskType.causal

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        **_: object,
    ) -> Tensor:
        """query [T, B, heads, D], key and value [S, B, groups, D] -> [T, B, heads * D]; mask [B or 1, 1, T, S] is True where hidden."""
        q_BNTD, k_BGSD, v_BGSD = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        visible = None if attention_mask is None else ~attention_mask.bool()
        out_BNTD = F.scaled_dot_product_attention(
            q_BNTD,
            k_BGSD,
            v_BGSD,
            attn_mask=visible,
            is_causal=visible is None and self.is_causal,
            scale=self.softmax_scale,
            enable_gqa=q_BNTD.size(1) != k_BGSD.size(1),
        )
        return out_BNTD.permute(2, 0, 1, 3).reshape(query.size(0), query.size(1), -1)


class TorchRotaryEmbedding(RotaryEmbedding):
    """Rotary angles on whatever device the model is on; Megatron's own insist on CUDA and keep a cache per process."""

    def __init__(self, head_dim: int, base: float, cp_group: ProcessGroup):
        super().__init__(
            kv_channels=head_dim, rotary_percent=1.0, rotary_base=base, use_cpu_initialization=True, cp_group=cp_group
        )
        self.head_dim, self.base = head_dim, base
        # Follows the module to its device. The frequencies themselves must not follow it into BF16.
        self.register_buffer("place", torch.empty(0), persistent=False)

    def forward(self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, **_: object) -> Tensor:
        """Angles [max_seq_len, 1, 1, head_dim] FP32, each frequency twice (rotate-half, as in Llama)."""
        device = self.place.device
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device) / self.head_dim
        positions = torch.arange(max_seq_len, dtype=torch.float32, device=device) + offset
        angles = torch.outer(positions, 1.0 / self.base**exponents)
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]


def torch_block_spec(config: TransformerConfig) -> TransformerBlockSubmodules:
    """Plain torch layers; the final norm is named too, or Megatron-core takes Transformer Engine's wherever that is importable."""
    submodules = get_gpt_layer_local_submodules(normalization=config.normalization)
    attention = submodules.self_attention
    attention = dataclasses.replace(
        attention, submodules=dataclasses.replace(attention.submodules, core_attention=TorchCoreAttention)
    )
    layer = ModuleSpec(module=TransformerLayer, submodules=dataclasses.replace(submodules, self_attention=attention))
    layers = [layer] * get_num_layers_to_build(config)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=WrappedTorchNorm)


def te_layer_spec(config: TransformerConfig) -> ModuleSpec:
    """Megatron-core's Transformer Engine layer with the kernel for short windows, and the op fuser where the configuration asks for it."""
    # Triton, which the kernel is written in, is there wherever Transformer Engine is, but not on every CPU.
    from yxanul_nemo.model.attention import WindowSelfAttention

    layer = get_gpt_layer_with_transformer_engine_spec(use_te_op_fuser=config.use_transformer_engine_op_fuser)
    attention = dataclasses.replace(layer.submodules.self_attention, module=WindowSelfAttention)
    return dataclasses.replace(layer, submodules=dataclasses.replace(layer.submodules, self_attention=attention))
