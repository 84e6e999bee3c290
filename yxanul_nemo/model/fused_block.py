"""Megatron-core's transformer block through the project's kernels: the same layers, weights and FP8, fewer passes over memory.

Autograd sees stretches between one layer's attention and the next one's: output projection, residual, norm, SwiGLU, residual, the next
norm, the next projection to queries, keys and values. Inside a stretch each matrix is rounded to FP8 where it is computed, in the order
that each product needs (`kernels.layer_ops`), which separate modules cannot do, whose results leave them in BF16. Scales are delayed
(`delayed_scales`). Attention itself is what `WindowSelfAttention` uses.

`layer_choices.why_not_fused` says which models it is not for: theirs, and BF16's, is Megatron-core's block of Transformer Engine's modules.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.autograd.function import once_differentiable

from yxanul_nemo.config.training import FP8_MULTIPLE
from yxanul_nemo.kernels.heads import Heads
from yxanul_nemo.kernels.layer_ops import (
    Matrix,
    Slot,
    add_norm,
    join_rope,
    quantize,
    swiglu,
    swiglu_backward,
)
from yxanul_nemo.kernels.split_rope import split_rope
from yxanul_nemo.kernels.te_calls import input_gradient, norm_gradient, product, weight_gradient
from yxanul_nemo.kernels.window_attention import window_attention
from yxanul_nemo.model.delayed_scales import DelayedScales


class FusedBlock(TransformerBlock):
    """A `TransformerBlock` whose layers have been built already and whose forward pass is this one."""

    scales: DelayedScales

    @classmethod
    def take_over(cls, block: TransformerBlock) -> None:
        """Give a block this class's forward pass. GPTModel names the class of its block itself, and this one adds no parameters."""
        assert type(block) is TransformerBlock
        block.__class__ = cls
        block.scales = DelayedScales(
            len(block.layers),
            block.config.fp8_amax_history_len,
            block.config.fp8_amax_compute_algo == "max",
            torch.float8_e4m3fn if block.config.fp8 == "e4m3" else torch.float8_e5m2,
            torch.device("cuda", torch.cuda.current_device()),
            parallel_state.get_data_parallel_group(with_context_parallel=True),
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *,
        rotary_pos_emb: Tensor,
        packed_seq_params: PackedSeqParams | None = None,
        **options: object,
    ) -> Tensor:
        """hidden_states [T, B, hidden] -> the last norm's result, the same shape; masks as `WindowSelfAttention` takes them."""
        is_whole = hidden_states.size(0) * hidden_states.size(1) % FP8_MULTIPLE == 0
        if not self.config.fp8 or not is_whole:
            assert is_whole or not torch.is_grad_enabled(), "PrecisionConfig.token_multiple"
            with _without_fp8(self.config):
                return super().forward(
                    hidden_states,
                    attention_mask,
                    rotary_pos_emb=rotary_pos_emb,
                    packed_seq_params=packed_seq_params,
                    **options,
                )
        seq_len, batch_size = hidden_states.shape[:2]
        slots = self.scales.begin_pass(is_training=torch.is_grad_enabled())
        first = self.layers[0].self_attention
        angles_TD = rotary_pos_emb[:, 0, 0].contiguous()
        is_mixed = packed_seq_params is None and first.takes_mixed(seq_len, hidden_states.dtype)
        rope = None if is_mixed else Rope.of(angles_TD, first.heads)
        shape = Shape(seq_len, batch_size, self.config.layernorm_epsilon, rope)

        nothing = (None,) * 4
        *qkv, residual = _Stretch.apply(
            shape, None, slots[0], None, hidden_states.flatten(0, 1), *nothing, *_weights_in(self.layers[0])
        )
        for number, layer in enumerate(self.layers):
            attention = layer.self_attention
            if is_mixed:
                attended_TBO = window_attention(qkv[0], angles_TD, attention.heads, attention_mask)
            else:
                attended_TBO = attention.attend(*qkv, attention_mask, packed_seq_params)
            is_last = number == len(self.layers) - 1
            *qkv, residual = _Stretch.apply(
                shape,
                slots[number],
                None if is_last else slots[number + 1],
                attended_TBO.flatten(0, 1),
                residual,
                *_weights_out(layer),
                *((self.final_layernorm.weight, None) if is_last else _weights_in(self.layers[number + 1])),
            )
        return residual.view(seq_len, batch_size, -1)


def _weights_in(layer: TransformerLayer) -> tuple[Tensor, Tensor]:
    """Of a layer, what comes before attention: norm and projection."""
    projection = layer.self_attention.linear_qkv
    return projection.layer_norm_weight, projection.weight


def _weights_out(layer: TransformerLayer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What comes after it: output projection, norm, gate and up projections, down projection."""
    fc1 = layer.mlp.linear_fc1
    return layer.self_attention.linear_proj.weight, fc1.layer_norm_weight, fc1.weight, layer.mlp.linear_fc2.weight


@contextmanager
def _without_fp8(config: TransformerConfig) -> Iterator[None]:
    kept, config.fp8 = config.fp8, None
    try:
        yield
    finally:
        config.fp8 = kept


class Rope(NamedTuple):
    """How the mixed projection is split and turned."""

    angles_TD: Tensor
    heads: Heads
    turn: tuple[Tensor, Tensor]
    """Cosines and sines of the angles, which differ in their first half only."""

    @classmethod
    def of(cls, angles_TD: Tensor, heads: Heads) -> "Rope":
        """The angles as `split_rope` takes them."""
        angles_TH = angles_TD[:, : heads.head_dim // 2]
        return cls(angles_TD, heads, (angles_TH.cos(), angles_TH.sin()))


class Shape(NamedTuple):
    """What all stretches of a pass have in common."""

    seq_len: int
    batch_size: int
    eps: float
    rope: Rope | None
    """None: the projection is handed on as it is, mixed."""


class _Stretch(torch.autograd.Function):
    """From one layer's attention to the next one's. Letters: N all tokens, H hidden, O heads' outputs, F twice the feed-forward width."""

    @staticmethod
    def forward(
        ctx: Any,
        shape: Shape,
        before: dict[str, Slot] | None,
        after: dict[str, Slot] | None,
        attended_NO: Tensor | None,
        residual_NH: Tensor,
        proj: Tensor | None,
        norm_2: Tensor | None,
        fc1: Tensor | None,
        fc2: Tensor | None,
        norm_1: Tensor,
        qkv: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Args: slots of the layer whose attention came before and of the one that comes after, None at the model's ends; weights of both.

        Returns:
            (queries, keys, values, residual), or (mixed projection, residual) [T, B, ...]; at the model's end (the last norm's result,).
        """
        dtype, y_NH = residual_NH.dtype, None
        ctx.shape, ctx.before, ctx.after, ctx.weights = shape, before, after, (proj, fc1, fc2, qkv)
        saved: list[Tensor | None] = []
        if before is not None:
            assert attended_NO is not None and proj is not None and norm_2 is not None
            assert fc1 is not None and fc2 is not None
            attended = quantize(attended_NO, before["attended"])
            proj_8, fc1_8, fc2_8 = (quantize(w, before[n]) for w, n in ((proj, "proj"), (fc1, "fc1"), (fc2, "fc2")))
            y_NH = product(attended, proj_8, dtype)
            residual_NH, normed, rstd_N = add_norm(y_NH, residual_NH, norm_2, shape.eps, before["normed_2"])
            gate_up_NF = product(normed, fc1_8, dtype)
            y_NH = product(swiglu(gate_up_NF, before["activated"]), fc2_8, dtype)
            saved += [attended.columns, residual_NH, rstd_N, normed.columns, gate_up_NF]
            saved += [proj_8.columns, fc1_8.columns, fc2_8.columns]
        if after is None:
            total_NH, last_NH, rstd_N = add_norm(y_NH, residual_NH, norm_1, shape.eps, None)
            ctx.save_for_backward(norm_2, norm_1, *saved, total_NH, rstd_N)
            return (last_NH,)
        assert qkv is not None
        total_NH, normed, rstd_N = add_norm(y_NH, residual_NH, norm_1, shape.eps, after["normed_1"])
        qkv_8 = quantize(qkv, after["qkv"])
        qkv_TBQ = product(normed, qkv_8, dtype).view(shape.seq_len, shape.batch_size, -1)
        ctx.save_for_backward(norm_2, norm_1, *saved, total_NH, rstd_N, normed.columns, qkv_8.columns)
        if before is None:
            # An autograd.Function must not return an input unchanged, so this is a view of it.
            total_NH = total_NH.view_as(total_NH)
        if shape.rope is None:
            return qkv_TBQ, total_NH
        return *split_rope(qkv_TBQ, shape.rope.angles_TD, shape.rope.heads), total_NH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        shape, before, after = ctx.shape, ctx.before, ctx.after
        norm_2, norm_1, *saved = ctx.saved_tensors
        dqkv_w = dproj_w = dnorm_2 = dfc1_w = dfc2_w = dattended_NO = None
        if after is None:
            (dnormed_NH,), direct_NH = grads, None
        else:
            qkv_columns, normed_columns = saved.pop(), saved.pop()
            *dheads, direct_NH = grads
            dqkv = _mixed_gradient(shape, dheads, after["d_qkv"])
            dtype = direct_NH.dtype
            dnormed_NH = input_gradient(dqkv, Matrix(None, qkv_columns, after["qkv"].scale_inv), dtype)
            dqkv_w = _weight_gradient(dqkv, Matrix(None, normed_columns, after["normed_1"].scale_inv), ctx.weights[3])
        rstd_N, total_NH = saved.pop(), saved.pop()
        dresidual_NH, dnorm_1 = norm_gradient(dnormed_NH, total_NH, rstd_N, norm_1, direct_NH)
        if before is not None:
            dtype = dresidual_NH.dtype
            dy = quantize(dresidual_NH, before["d_fc2"])
            attended_c, residual_NH, rstd_N, normed_c, gate_up_NF, proj_c, fc1_c, fc2_c = saved
            inv = {name: slot.scale_inv for name, slot in before.items()}
            dactivated_NF = input_gradient(dy, Matrix(None, fc2_c, inv["fc2"]), dtype)
            dgate_up, activated = swiglu_backward(dactivated_NF, gate_up_NF, before["d_fc1"], before["activated"])
            dfc2_w = _weight_gradient(dy, activated, ctx.weights[2])
            dnormed_NH = input_gradient(dgate_up, Matrix(None, fc1_c, inv["fc1"]), dtype)
            dfc1_w = _weight_gradient(dgate_up, Matrix(None, normed_c, inv["normed_2"]), ctx.weights[1])
            dresidual_NH, dnorm_2 = norm_gradient(dnormed_NH, residual_NH, rstd_N, norm_2, dresidual_NH)
            dy = quantize(dresidual_NH, before["d_proj"])
            dattended_NO = input_gradient(dy, Matrix(None, proj_c, inv["proj"]), dtype)
            dproj_w = _weight_gradient(dy, Matrix(None, attended_c, inv["attended"]), ctx.weights[0])
        return None, None, None, dattended_NO, dresidual_NH, dproj_w, dnorm_2, dfc1_w, dfc2_w, dnorm_1, dqkv_w


def _weight_gradient(dy: Matrix, x: Matrix, weight: Tensor) -> Tensor | None:
    """A weight's gradient, or None where the product adds it to those of other micro-batches in FP32 (`training.flat_parameters`)."""
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None:
        return weight_gradient(dy, x, weight.dtype)
    weight_gradient(dy, x, main_grad.dtype, into=main_grad)
    return None


def _mixed_gradient(shape: Shape, dheads: list[Tensor], slot: Slot) -> Matrix:
    """The mixed projection's gradient in FP8 from that of what it was handed on as."""
    if shape.rope is None:
        return quantize(dheads[0].flatten(0, 1), slot)
    dquery, dkey, dvalue = dheads
    return join_rope(dquery, dkey, dvalue, shape.rope.turn, shape.rope.heads, shape.batch_size, slot)
