"""Megatron-core's self-attention with the project's kernel for short windows, on GPUs."""

from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from yxanul_nemo.kernels.window_attention import Heads, why_unsupported, window_attention


class WindowSelfAttention(SelfAttention):
    """Windows that fit one tile go through `window_attention`, RoPE included; all others the way of Transformer Engine.

    cuDNN's fused attention fails inside a CUDA graph below 128 tokens (illegal memory access; Transformer Engine 2.20, cuDNN 9.14), and
    unfused attention spends most of a step at these lengths on launches.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        rotary_pos_emb: Tensor | None = None,
        **options: object,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [T, B, hidden] -> (output [T, B, hidden], bias or None), causal."""
        heads = Heads(
            self.num_query_groups_per_partition,
            self.num_attention_heads_per_partition // self.num_query_groups_per_partition,
            self.hidden_size_per_attention_head,
        )
        plain = attention_mask is None and all(option is None for option in options.values())
        reason = why_unsupported(hidden_states.dtype, hidden_states.size(0), heads.head_dim)
        if not plain or reason is not None or self.config.context_parallel_size > 1:
            return super().forward(hidden_states, attention_mask, rotary_pos_emb=rotary_pos_emb, **options)
        qkv_TBGX, _ = self.get_query_key_value_tensors(hidden_states, split_qkv=False)
        return self.linear_proj(window_attention(qkv_TBGX.flatten(2), rotary_pos_emb[:, 0, 0], heads))
