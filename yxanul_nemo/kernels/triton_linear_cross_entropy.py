"""`linear_cross_entropy` by Triton kernels: four matrix products in all, logits only ever in registers.

The head is attention with one key and value per vocabulary row, so FlashAttention's forward pass serves it: while it sums
exp(logit) for the loss it also sums exp(logit) * e, which is all that the gradient of z needs:

    dz_t = g_t * (sum_v p_tv e_v - e_label)        dE_v = sum_t g_t p_tv z_t - sum_{t: label_t = v} g_t z_t

Forward takes two products (logits, weighted rows) and backward two (logits again, dE); cross entropy that recomputes its
logits for each gradient takes five. Every sum has a fixed order, there are no atomics, so results repeat to the last bit.

Letters: T tokens, R inner dimension, V rows of the table in this process, S ranges of rows summed by separate programs.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from yxanul_nemo.kernels.linear_cross_entropy_kernels import (
    bias_kernel,
    de_kernel,
    dz_kernel,
    head_forward_kernel,
    label_kernel,
)
from yxanul_nemo.kernels.vocab_shard import VocabShard

BLOCK_LABELS = 32


class Tiles(NamedTuple):
    """Launch shape of a kernel. `resident` programs fit on one multiprocessor; `registers` caps those of a thread."""

    tokens: int
    rows: int
    warps: int
    stages: int
    resident: int
    registers: int | None = None


class Gpu(NamedTuple):
    """What the launch shapes depend on."""

    capability: tuple[int, int]
    multiprocessors: int

    @classmethod
    def of(cls, device: torch.device) -> "Gpu":
        """The GPU that tensors are on."""
        found = torch.cuda.get_device_properties(device)
        return cls((found.major, found.minor), found.multi_processor_count)


# Tiles for compute capability 9 are the fastest of those measured on an H100. The others are not tuned by measurement:
# up to an inner dimension of 128 they keep the loops in registers, and up to 256 they stay within 99 KiB of shared memory,
# by the compiler's report for 8.0, 8.9 and 12.0.


def forward_tiles(capability: tuple[int, int], inner: int) -> Tiles:
    """Tiles of the forward kernel for a GPU and an inner dimension rounded up to a power of two."""
    if capability[0] == 9:
        return Tiles(128, 64, 8, 3, 2, 128) if inner <= 128 else Tiles(128, 64, 8, 2, 1)
    return Tiles(128, 32, 8, 2, 1) if inner <= 128 else Tiles(64, 32, 4, 2, 1)


def backward_tiles(capability: tuple[int, int], inner: int) -> Tiles:
    """Tiles of the backward kernel for a GPU and an inner dimension rounded up to a power of two."""
    if capability[0] == 9:
        return Tiles(64, 128, 4, 3, 2) if inner <= 128 else Tiles(64, 64, 4, 2, 2)
    return Tiles(32, 128, 8, 2, 1)


def why_unsupported(z_TR: Tensor, e_VR: Tensor) -> str | None:
    """Why these kernels cannot take the inputs, or None if they can."""
    if not (z_TR.is_cuda and e_VR.is_cuda):
        return "z_TR and e_VR are not on a GPU"
    if torch.version.hip is not None or torch.cuda.get_device_capability(z_TR.device) < (8, 0):
        return "the GPU is not an NVIDIA GPU of compute capability 8.0 or later"
    if z_TR.dtype != torch.bfloat16:
        return f"inputs are {z_TR.dtype}, not torch.bfloat16"
    inner = z_TR.shape[1]
    if inner % 16 or not 16 <= inner <= 256:
        return f"the inner dimension is {inner}, not a multiple of 16 up to 256"
    if max(z_TR.numel(), e_VR.numel()) >= 2**31:
        return "an input has 2^31 elements or more"
    return None


def triton_linear_cross_entropy(
    z_TR: Tensor, e_VR: Tensor, labels_T: Tensor, shard: VocabShard, ignore_index: int
) -> Tensor:
    """Loss of each token [T] in float32; see `linear_cross_entropy`. Inputs must pass `why_unsupported`."""
    wants_dz = z_TR.requires_grad and torch.is_grad_enabled()
    return _TritonLinearCrossEntropy.apply(z_TR, e_VR, labels_T, shard, ignore_index, wants_dz)


class _TritonLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z_TR: Tensor, e_VR: Tensor, labels_T: Tensor, shard: VocabShard, ignore_index: int, wants_dz: bool
    ) -> Tensor:
        z_TR, e_VR = _aligned(z_TR), _aligned(e_VR)
        lse_ST, mean_STR = _sweep_vocabulary(z_TR, e_VR, shard.valid_rows, wants_dz)
        row_T = _local_rows(labels_T, shard, ignore_index)
        lse_T, label_logit_T = _sum_ranges(z_TR, e_VR, row_T, lse_ST)
        lse_T, label_logit_T = shard.reduce(lse_T, label_logit_T)
        ctx.save_for_backward(z_TR, e_VR, labels_T, row_T, lse_T, lse_ST, mean_STR)
        ctx.shard, ctx.ignore_index = shard, ignore_index
        return shard.loss(lse_T, label_logit_T, labels_T, ignore_index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_T: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        z_TR, e_VR, labels_T, row_T, lse_T, lse_ST, mean_STR = ctx.saved_tensors
        g_T = torch.where(ctx.shard.counted(labels_T, ctx.ignore_index), g_T.float(), 0.0)
        dz_TR = de_VR = None
        if ctx.needs_input_grad[0]:
            dz_TR = _gradient_of_z(g_T, e_VR, row_T, lse_T, lse_ST, mean_STR, ctx.shard.group)
        if ctx.needs_input_grad[1]:
            de_VR = _gradient_of_e(g_T, z_TR, e_VR, row_T, lse_T, ctx.shard.valid_rows)
        return dz_TR, de_VR, None, None, None, None


def _aligned(x: Tensor) -> Tensor:
    """`x` contiguous and on a 16-byte boundary, as the GPU's tile loads need it; a copy only where it is not."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _local_rows(labels_T: Tensor, shard: VocabShard, ignore_index: int) -> Tensor:
    """Row of each label in this process's table, int32, or -1 where it is ignored or held by another process."""
    row_T = labels_T - shard.first_row
    here_T = shard.counted(labels_T, ignore_index) & (row_T >= 0) & (row_T < shard.valid_rows)
    return torch.where(here_T, row_T, -1).int()


def _ranges(tokens: int, valid_rows: int, tiles: Tiles, multiprocessors: int) -> tuple[int, int]:
    """Number of ranges the vocabulary is split into, and the rows of each, to keep every multiprocessor busy.

    The kernel takes as long as the busiest multiprocessor: ceil(programs / slots) / ranges of the whole vocabulary.
    """
    blocks, slots = triton.cdiv(tokens, tiles.tokens), multiprocessors * tiles.resident
    vocab_tiles = triton.cdiv(valid_rows, tiles.rows)

    def cost(ranges: int) -> float:
        return triton.cdiv(blocks * ranges, slots) / ranges * (1 + 0.005 * ranges)

    # Partial sums of at most six full rounds of programs are kept, which bounds their memory for any number of tokens.
    most = max(1, min(6 * slots // blocks, vocab_tiles, 128))
    per_range = triton.cdiv(vocab_tiles, min(range(1, most + 1), key=cost)) * tiles.rows
    return triton.cdiv(valid_rows, per_range), per_range


def _launch(tiles: Tiles) -> dict[str, int]:
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    return options if tiles.registers is None else {**options, "maxnreg": tiles.registers}


def _sweep_vocabulary(z_TR: Tensor, e_VR: Tensor, valid_rows: int, wants_mean: bool) -> tuple[Tensor, Tensor | None]:
    """Log-sum-exp of each range's logits [S, T], and the mean of its rows weighted by their probability [S, T, R]."""
    tokens, inner = z_TR.shape
    if tokens == 0 or valid_rows == 0:
        lse_ST = z_TR.new_full((1, tokens), float("-inf"), dtype=torch.float32)
        return lse_ST, z_TR.new_zeros((1, tokens, inner), dtype=torch.float32) if wants_mean else None
    gpu = Gpu.of(z_TR.device)
    block_r = triton.next_power_of_2(inner)
    tiles = forward_tiles(gpu.capability, block_r)
    ranges, per_range = _ranges(tokens, valid_rows, tiles, gpu.multiprocessors)
    lse_ST = z_TR.new_empty((ranges, tokens), dtype=torch.float32)
    mean_STR = z_TR.new_empty((ranges, tokens, inner), dtype=torch.float32) if wants_mean else None
    head_forward_kernel[(triton.cdiv(tokens, tiles.tokens), ranges)](
        z_TR,
        TensorDescriptor.from_tensor(e_VR, [tiles.rows, block_r]),
        lse_ST,
        mean_STR,
        tokens,
        inner,
        valid_rows,
        per_range,
        BLOCK_T=tiles.tokens,
        BLOCK_V=tiles.rows,
        BLOCK_R=block_r,
        WANTS_MEAN=wants_mean,
        **_launch(tiles),
    )
    return lse_ST, mean_STR


def _sum_ranges(z_TR: Tensor, e_VR: Tensor, row_T: Tensor, lse_ST: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp over all ranges [T] and the label's logit [T], 0 where the label's row is not here."""
    tokens, inner = z_TR.shape
    lse_T, label_logit_T = torch.empty_like(lse_ST[0]), torch.empty_like(lse_ST[0])
    if tokens:
        label_kernel[(triton.cdiv(tokens, 32),)](
            z_TR,
            e_VR,
            row_T,
            lse_ST,
            lse_T,
            label_logit_T,
            tokens,
            inner,
            lse_ST.shape[0],
            BLOCK_T=32,
            BLOCK_R=triton.next_power_of_2(inner),
        )
    return lse_T, label_logit_T


def _gradient_of_z(
    g_T: Tensor,
    e_VR: Tensor,
    row_T: Tensor,
    lse_T: Tensor,
    lse_ST: Tensor,
    mean_STR: Tensor,
    group: dist.ProcessGroup | None,
) -> Tensor:
    ranges, tokens, inner = mean_STR.shape
    # Partial gradients are summed over the group in float32, before they are rounded.
    dz_TR = torch.empty((tokens, inner), device=g_T.device, dtype=e_VR.dtype if group is None else torch.float32)
    if tokens:
        dz_kernel[(triton.cdiv(tokens, 32),)](
            g_T,
            e_VR,
            row_T,
            lse_T,
            lse_ST,
            mean_STR,
            dz_TR,
            tokens,
            inner,
            ranges,
            BLOCK_T=32,
            BLOCK_R=triton.next_power_of_2(inner),
        )
    if group is not None:
        dist.all_reduce(dz_TR, op=dist.ReduceOp.SUM, group=group)
    return dz_TR.to(e_VR.dtype)


def _gradient_of_e(g_T: Tensor, z_TR: Tensor, e_VR: Tensor, row_T: Tensor, lse_T: Tensor, valid_rows: int) -> Tensor:
    tokens, inner = z_TR.shape
    rows = e_VR.shape[0]
    if tokens == 0 or valid_rows == 0:
        return torch.zeros_like(e_VR)
    block_r = triton.next_power_of_2(inner)
    tiles = backward_tiles(Gpu.of(z_TR.device).capability, block_r)
    padded_tokens = triton.cdiv(tokens, tiles.tokens) * tiles.tokens
    # Weights are relative to the largest, so that equal ones (a mean, a loss mask) are exactly 1 in bfloat16.
    largest = g_T.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    sweeps = 1 + (g_T < 0).any().int()
    bias_2T = torch.empty((2, padded_tokens), device=g_T.device, dtype=torch.float32)
    bias_kernel[(triton.cdiv(padded_tokens, 1024), 2)](
        g_T, largest, lse_T, bias_2T, tokens, padded_tokens, BLOCK_T=1024
    )
    blocks = triton.cdiv(rows, tiles.rows)
    # Tokens ordered by label give each block of rows its own tokens without atomics; labels not here come first.
    sorted_row_T, token_T = torch.sort(row_T, stable=True)
    first_rows = torch.arange(0, (blocks + 1) * tiles.rows, tiles.rows, device=g_T.device, dtype=torch.int32)
    first_label = torch.searchsorted(sorted_row_T, first_rows, out_int32=True)
    de_VR = torch.empty_like(e_VR)
    de_kernel[(blocks,)](
        e_VR,
        TensorDescriptor.from_tensor(z_TR, [tiles.tokens, block_r]),
        z_TR,
        g_T,
        largest,
        sweeps,
        bias_2T,
        sorted_row_T,
        token_T,
        first_label,
        de_VR,
        padded_tokens,
        inner,
        valid_rows,
        rows,
        BLOCK_V=tiles.rows,
        BLOCK_T=tiles.tokens,
        BLOCK_L=BLOCK_LABELS,
        BLOCK_R=block_r,
        **_launch(tiles),
    )
    return de_VR
