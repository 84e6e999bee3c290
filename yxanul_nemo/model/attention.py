"""Megatron-core's self-attention with the project's kernels around and, for most windows, in place of Transformer Engine's attention."""

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from yxanul_nemo.kernels.attention_limits import dtype_name
from yxanul_nemo.kernels.causal_attention import causal_attention
from yxanul_nemo.kernels.heads import Heads
from yxanul_nemo.kernels.split_rope import split_rope
from yxanul_nemo.kernels.window_attention import window_attention
from yxanul_nemo.model.documents import hidden_tokens
from yxanul_nemo.model.layer_choices import TILES, WINDOW, attention_kernel


class WindowSelfAttention(SelfAttention):
    """Short windows go through `window_attention`, RoPE included; longer ones through `split_rope` and, where `uses_tiles`,
    `causal_attention`, else Transformer Engine.

    cuDNN's fused attention fails inside a CUDA graph below 128 tokens (illegal memory access; Transformer Engine 2.20, cuDNN 9.14), and
    unfused attention spends most of a step at these lengths on launches.
    """

    uses_tiles = False
    """`model.layer_choices.uses_tiles`."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **options: object,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [T, B, hidden] -> (output [T, B, hidden], bias or None), causal.

        Args:
            attention_mask: where each token's document begins in its window [B, T] (`model.documents`); None: windows are whole.
            packed_seq_params: the list of documents, where the windows stand one after another in one row [B x T, 1, hidden].
        """
        heads = self.heads
        is_plain = all(option is None for option in options.values())
        # Under context parallelism a rank's tokens are not neighbours, which Transformer Engine's own path knows.
        is_shared = self.config.context_parallel_size > 1
        if rotary_pos_emb is None or not is_plain or is_shared or heads.head_dim & (heads.head_dim - 1):
            assert attention_mask is None and packed_seq_params is None, "config.run refuses document masks here"
            return super().forward(hidden_states, attention_mask, rotary_pos_emb=rotary_pos_emb, **options)
        qkv_TBGX, _ = self.get_query_key_value_tensors(hidden_states, split_qkv=False)
        qkv_TBQ, angles_TD = qkv_TBGX.flatten(2), rotary_pos_emb[:, 0, 0]
        if packed_seq_params is None and self.takes_mixed(qkv_TBQ.size(0), qkv_TBQ.dtype):
            return self.linear_proj(window_attention(qkv_TBQ, angles_TD, heads, attention_mask))
        query, key, value = split_rope(qkv_TBQ, angles_TD, heads)
        return self.linear_proj(self.attend(query, key, value, attention_mask, packed_seq_params))

    @property
    def heads(self) -> Heads:
        """Shape of this rank's heads."""
        return Heads(
            self.num_query_groups_per_partition,
            self.num_attention_heads_per_partition // self.num_query_groups_per_partition,
            self.hidden_size_per_attention_head,
        )

    def takes_mixed(self, seq_len: int, dtype: torch.dtype) -> bool:
        """Whether whole windows of this length go through `window_attention`, straight from the mixed projection."""
        return self.kernel_for(seq_len, dtype) == WINDOW

    def takes_tiles(self, seq_len: int, dtype: torch.dtype) -> bool:
        """Whether windows of this length, whole or with documents in them, go through `causal_attention`."""
        return self.kernel_for(seq_len, dtype) == TILES

    def kernel_for(self, seq_len: int, dtype: torch.dtype) -> str | None:
        """`model.layer_choices.attention_kernel` of windows of this length on this GPU."""
        tiles_on = torch.cuda.get_device_capability() if self.uses_tiles else None
        return attention_kernel(dtype_name(dtype), seq_len, self.heads.head_dim, tiles_on)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: PackedSeqParams | None,
    ) -> Tensor:
        """Attention of rotated queries to keys and values [T, B, their heads, head_dim] -> [T, B, heads x head_dim].

        Mask and documents are as in `forward`; with a list of documents it is Transformer Engine's.
        """
        if packed_seq_params is not None:
            out_NO = self.core_attention(
                *(x.squeeze(1) for x in (query, key, value)),
                None,
                attn_mask_type=self.attn_mask_type,
                packed_seq_params=packed_seq_params,
            )
            return out_NO.unsqueeze(1)
        if self.takes_tiles(query.size(0), query.dtype):
            return causal_attention(query, key, value, attention_mask)
        if attention_mask is None:
            return self.core_attention(query, key, value, None, attn_mask_type=self.attn_mask_type)
        # What the kernel does not take, FP32 above all, is left to unfused attention.
        mask = hidden_tokens(attention_mask)
        return self.core_attention(query, key, value, mask, attn_mask_type=AttnMaskType.arbitrary)
