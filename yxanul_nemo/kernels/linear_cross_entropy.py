"""Cross entropy of a linear head without its logits: loss and both gradients from z_TR and e_VR, never a whole [T, V].

Shapes: T tokens, R inner dimension (the factorized embedding's rank), V rows of the table that this process holds.
Two implementations give the same numbers: chunks of tokens in plain torch (any device, any dtype) and flash-style
Triton kernels (`triton_linear_cross_entropy`, bfloat16 on NVIDIA GPUs). The idea of recomputing logits in tiles is that
of FlashAttention (Dao et al., 2022, arXiv:2205.14135) and Cut Cross-Entropy (Wijmans et al., 2024, arXiv:2411.09009).
"""

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from yxanul_nemo.kernels.vocab_shard import VocabShard

# A chunk's logits stay below this size, however long the vocabulary is.
CHUNK_LOGITS_BYTES = 256 * 2**20

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def linear_cross_entropy(
    z_TR: Tensor,
    e_VR: Tensor,
    labels_T: Tensor,
    *,
    vocab_size: int,
    ignore_index: int = -100,
    tp_group: dist.ProcessGroup | None = None,
    impl: Literal["auto", "torch", "triton"] = "auto",
    deterministic: bool = False,
) -> Tensor:
    """Loss of each token, -log softmax(z_TR @ e_VR^T)[label], without ever holding the logits of all tokens.

    Sums are in float32 (float64 for float64 inputs), gradients come back in the inputs' dtypes. Rows of `e_VR` from
    `vocab_size` on are padding: they get no probability and a gradient of exactly 0. Neither implementation waits for
    the GPU, so both can be captured in a CUDA graph.

    With `tp_group` every rank holds the same `z_TR` and `labels_T` and its own rows of the padded table (rank k holds
    rows [k * V, (k + 1) * V)). Log-sum-exp, label logit and the gradient of `z_TR` are summed over the group here, so
    every rank returns the same loss and the full gradient: do not reduce that gradient over the group again.

    Args:
        z_TR: head input [T, R], float32, bfloat16, float16 or float64.
        e_VR: this process's rows of the embedding table [V, R], same dtype and device.
        labels_T: class of each token [T], integer, an index into the whole vocabulary.
        vocab_size: classes in the whole vocabulary, without padding.
        ignore_index: label of tokens whose loss and gradient are 0.
        tp_group: group over which the table's rows are split, None for one process.
        impl: "torch", "triton", or "auto": Triton where it supports the inputs, else torch.
        deterministic: ask for results equal to the last bit from run to run. Both implementations give that without
            being asked, so this changes nothing; it is a promise that any faster one to come has to keep.

    Returns:
        loss_T [T], float32 (float64 for float64 inputs). A label outside the vocabulary that is not `ignore_index`
        makes its loss NaN and its gradient 0: reading labels back to raise an error would stall the GPU.

    Raises:
        ValueError: shapes, dtypes or `vocab_size` do not fit together, or `impl="triton"` cannot take the inputs.
    """
    _check_inputs(z_TR, e_VR, labels_T, impl)
    shard = VocabShard.of(e_VR.shape[0], vocab_size, tp_group)
    if impl != "torch" and (z_TR.is_cuda or impl == "triton"):
        # Triton exists on GPU hosts only, so it is imported where it is used.
        from yxanul_nemo.kernels.triton_linear_cross_entropy import triton_linear_cross_entropy, why_unsupported

        reason = why_unsupported(z_TR, e_VR)
        if reason is None:
            return triton_linear_cross_entropy(z_TR, e_VR, labels_T, shard, ignore_index)
        if impl == "triton":
            raise ValueError(f"impl='triton' cannot be used: {reason}; use impl='auto' or 'torch'")
    return _ChunkedLinearCrossEntropy.apply(z_TR, e_VR, labels_T, shard, ignore_index)


def _check_inputs(z_TR: Tensor, e_VR: Tensor, labels_T: Tensor, impl: str) -> None:
    if impl not in ("auto", "torch", "triton"):
        raise ValueError(f"impl is {impl!r}, expected 'auto', 'torch' or 'triton'")
    if z_TR.ndim != 2 or e_VR.ndim != 2 or z_TR.shape[1] != e_VR.shape[1]:
        raise ValueError(f"z_TR {tuple(z_TR.shape)} and e_VR {tuple(e_VR.shape)} must be [T, R] and [V, R]")
    if labels_T.shape != z_TR.shape[:1] or labels_T.dtype not in (torch.int64, torch.int32):
        found = f"{labels_T.dtype} {tuple(labels_T.shape)}"
        raise ValueError(f"labels_T is {found}, expected int64 or int32 of shape [{z_TR.shape[0]}]")
    if z_TR.dtype != e_VR.dtype or z_TR.dtype not in DTYPES:
        raise ValueError(f"z_TR is {z_TR.dtype} and e_VR {e_VR.dtype}: both must have one dtype of {DTYPES}")


def _matmul(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """a @ b, summed and returned in float32 (float64 for float64 inputs), whatever the inputs' dtype."""
    if a_MK.dtype == torch.bfloat16:
        return torch.mm(a_MK, b_KN, out_dtype=torch.float32)
    return torch.mm(a_MK, b_KN)


def _add_matmul(sum_MN: Tensor, a_MK: Tensor, b_KN: Tensor) -> None:
    """sum += a @ b in the sum's dtype, in place."""
    if a_MK.dtype == torch.bfloat16:
        torch.addmm(sum_MN, a_MK, b_KN, out_dtype=sum_MN.dtype, out=sum_MN)
    else:
        sum_MN.addmm_(a_MK, b_KN)


def _valid_rows(e_VR: Tensor, valid_rows: int, dtype: torch.dtype) -> Tensor:
    """The rows that are no padding, then zeros up to a multiple of 16 (an odd width took a quarter longer on an H100)."""
    width = min(-(-valid_rows // 16) * 16, e_VR.shape[0])
    valid_VR = e_VR[:width].to(dtype)
    if width > valid_rows:
        valid_VR = valid_VR.masked_fill((torch.arange(width, device=e_VR.device) >= valid_rows)[:, None], 0.0)
    return valid_VR


def _logits(z_CR: Tensor, valid_VR: Tensor, valid_rows: int) -> Tensor:
    """Logits of a chunk, -inf where a row is padding."""
    logits_CV = _matmul(z_CR, valid_VR.t())
    logits_CV[:, valid_rows:] = float("-inf")
    return logits_CV


def _compute_dtype(x: Tensor) -> torch.dtype:
    """bfloat16 stays on GPUs, which multiply it with float32 sums; everything else below float32 is widened."""
    if x.dtype in (torch.float64, torch.float32) or (x.dtype == torch.bfloat16 and x.is_cuda):
        return x.dtype
    return torch.float32


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    """Forward keeps one number per token (log-sum-exp); backward computes each chunk's logits again."""

    @staticmethod
    def forward(ctx: Any, z_TR: Tensor, e_VR: Tensor, labels_T: Tensor, shard: VocabShard, ignore_index: int) -> Tensor:
        with torch.autocast(z_TR.device.type, enabled=False):
            dtype = _compute_dtype(z_TR)
            sum_dtype = torch.float64 if dtype == torch.float64 else torch.float32
            lse_T = z_TR.new_full(z_TR.shape[:1], float("-inf"), dtype=sum_dtype)
            label_logit_T = torch.zeros_like(lse_T)
            if shard.valid_rows:
                valid_VR = _valid_rows(e_VR, shard.valid_rows, dtype)
                row_T, here_T = _local_rows(labels_T, shard, ignore_index)
                for c in _chunks(z_TR.shape[0], valid_VR.shape[0], sum_dtype):
                    logits_CV = _logits(z_TR[c].to(dtype), valid_VR, shard.valid_rows)
                    label_logit_T[c] = logits_CV.gather(1, row_T[c, None]).squeeze(1) * here_T[c]
                    highest_C = logits_CV.amax(1)
                    # In place, where torch.logsumexp would need a second chunk of logits.
                    lse_T[c] = highest_C + logits_CV.sub_(highest_C[:, None]).exp_().sum(1).log_()
            lse_T, label_logit_T = shard.reduce(lse_T, label_logit_T)
        ctx.save_for_backward(z_TR, e_VR, labels_T, lse_T)
        ctx.shard, ctx.ignore_index = shard, ignore_index
        return shard.loss(lse_T, label_logit_T, labels_T, ignore_index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_T: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        z_TR, e_VR, labels_T, lse_T = ctx.saved_tensors
        shard = ctx.shard
        dtype = _compute_dtype(z_TR)
        dz_TR = torch.zeros_like(z_TR, dtype=lse_T.dtype) if ctx.needs_input_grad[0] else None
        de_VR = torch.zeros_like(e_VR, dtype=lse_T.dtype) if ctx.needs_input_grad[1] else None
        with torch.autocast(z_TR.device.type, enabled=False):
            if shard.valid_rows:
                g_T = torch.where(shard.counted(labels_T, ctx.ignore_index), g_T.to(lse_T.dtype), 0.0)
                valid_VR = _valid_rows(e_VR, shard.valid_rows, dtype)
                row_T, here_T = _local_rows(labels_T, shard, ctx.ignore_index)
                for c in _chunks(z_TR.shape[0], valid_VR.shape[0], lse_T.dtype):
                    z_CR = z_TR[c].to(dtype)
                    d_CV = _logits(z_CR, valid_VR, shard.valid_rows).sub_(lse_T[c, None]).exp_()
                    # One column per row: no two writes meet, so this is deterministic, unlike index_add_ into de_VR.
                    at_label_C1 = d_CV.gather(1, row_T[c, None]) - here_T[c, None].to(d_CV.dtype)
                    d_CV = d_CV.scatter_(1, row_T[c, None], at_label_C1).to(dtype)
                    # The weight goes to the small operands, which spares one pass over the chunk of logits.
                    if dz_TR is not None:
                        dz_TR[c] = _matmul(d_CV, valid_VR) * g_T[c, None]
                    if de_VR is not None:
                        _add_matmul(de_VR[: valid_VR.shape[0]], d_CV.t(), (z_CR * g_T[c, None]).to(dtype))
                # A padded row next to the valid ones is multiplied along, and 0 times a value past float32 is NaN.
                if de_VR is not None:
                    de_VR[shard.valid_rows :] = 0
            if dz_TR is not None and shard.group is not None:
                dist.all_reduce(dz_TR, op=dist.ReduceOp.SUM, group=shard.group)
        return (
            None if dz_TR is None else dz_TR.to(z_TR.dtype),
            None if de_VR is None else de_VR.to(e_VR.dtype),
            None,
            None,
            None,
        )


def _local_rows(labels_T: Tensor, shard: VocabShard, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Row of each label in this process's table (any valid row where it has none), and whether it is there."""
    row_T = labels_T.long() - shard.first_row
    here_T = shard.counted(labels_T, ignore_index) & (row_T >= 0) & (row_T < shard.valid_rows)
    return row_T.clamp(0, shard.valid_rows - 1), here_T


def _chunks(tokens: int, valid_rows: int, dtype: torch.dtype) -> list[slice]:
    """Slices of tokens whose logits take at most CHUNK_LOGITS_BYTES."""
    size = max(1, CHUNK_LOGITS_BYTES // (valid_rows * dtype.itemsize))
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]
