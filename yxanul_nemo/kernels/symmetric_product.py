"""Products of matrices with their own transpose, of which one half is computed and stored twice. `polar` says what they are for.

Letters: S rows of x, L its columns, which are summed over; I, J rows and columns of a tile of the result.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_S, BLOCK_L = 128, 64
WARPS, STAGES = 8, 3


@triton.jit
def symmetric_product_kernel(
    x,
    added,
    scale,
    out,
    x_stride,
    row_stride,
    column_stride,
    n_rows,
    n_columns,
    alpha: tl.constexpr,
    beta: tl.constexpr,
    gamma: tl.constexpr,
    HAS_ADDED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """A tile on or under the diagonal of one matrix, and its mirror image."""
    number, matrix = tl.program_id(0), tl.program_id(1).to(tl.int64)
    # Tiles count row by row: 0; 1, 2; 3, 4, 5; ...
    tile_i = ((tl.sqrt(8.0 * number + 1.0) - 1.0) / 2.0).to(tl.int32)
    tile_i += ((tile_i + 1) * (tile_i + 2) // 2 <= number).to(tl.int32)
    tile_i -= (tile_i * (tile_i + 1) // 2 > number).to(tl.int32)
    tile_j = number - tile_i * (tile_i + 1) // 2
    at_I = tile_i * BLOCK_S + tl.arange(0, BLOCK_S)
    at_J = tile_j * BLOCK_S + tl.arange(0, BLOCK_S)
    at_L = tl.arange(0, BLOCK_L)
    base = x + matrix * x_stride
    left_IL = base + at_I[:, None] * row_stride + at_L[None, :] * column_stride
    right_JL = base + at_J[:, None] * row_stride + at_L[None, :] * column_stride
    sum_IJ = tl.zeros((BLOCK_S, BLOCK_S), tl.float32)
    for first in range(0, n_columns, BLOCK_L):
        if IS_WHOLE:
            a_IL, b_JL = tl.load(left_IL), tl.load(right_JL)
        else:
            real_L = first + at_L < n_columns
            a_IL = tl.load(left_IL, mask=(at_I < n_rows)[:, None] & real_L[None, :], other=0.0)
            b_JL = tl.load(right_JL, mask=(at_J < n_rows)[:, None] & real_L[None, :], other=0.0)
        sum_IJ = tl.dot(a_IL, b_JL.T, sum_IJ)
        left_IL += BLOCK_L * column_stride
        right_JL += BLOCK_L * column_stride
    sum_IJ *= alpha
    square = matrix * n_rows * n_rows
    here_IJ = at_I[:, None] * n_rows + at_J[None, :]
    real_IJ = (at_I < n_rows)[:, None] & (at_J < n_rows)[None, :]
    if HAS_ADDED:
        sum_IJ += beta * tl.load(added + square + here_IJ, mask=real_IJ, other=0.0).to(tl.float32)
    sum_IJ += tl.where(at_I[:, None] == at_J[None, :], gamma, 0.0)
    if HAS_SCALE:
        sum_IJ *= tl.load(scale + matrix)
    rounded_IJ = sum_IJ.to(out.dtype.element_ty)
    tl.store(out + square + here_IJ, rounded_IJ, mask=real_IJ)
    if tile_i != tile_j:
        there_JI = at_J[:, None] * n_rows + at_I[None, :]
        tl.store(out + square + there_JI, rounded_IJ.T, mask=(at_J < n_rows)[:, None] & (at_I < n_rows)[None, :])


def launch(
    x_NSL: Tensor, alpha: float, added_NSS: Tensor | None, beta: float, gamma: float, scale_N: Tensor | None
) -> Tensor:
    """As `polar.symmetric_product`."""
    matrices, rows, columns = x_NSL.shape
    assert 1 in x_NSL.stride()[1:] and (added_NSS is None or added_NSS.is_contiguous())
    out_NSS = torch.empty(matrices, rows, rows, dtype=x_NSL.dtype, device=x_NSL.device)
    side = triton.cdiv(rows, BLOCK_S)
    symmetric_product_kernel[(side * (side + 1) // 2, matrices)](
        x_NSL, added_NSS, scale_N, out_NSS, *x_NSL.stride(), rows, columns, alpha, beta, gamma,
        added_NSS is not None, scale_N is not None, rows % BLOCK_S == 0 and columns % BLOCK_L == 0,
        BLOCK_S, BLOCK_L, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return out_NSS
