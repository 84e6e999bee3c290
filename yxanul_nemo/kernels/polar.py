"""The polar factor of many matrices at once: the nearest matrix whose singular values are all 1, by products alone.

An odd polynomial of a matrix is the same polynomial of its singular values. Five of fifth degree, one after another, bring all that are
not tiny near 1 (Newton-Schulz iteration). The coefficients are the first of Polar Express (Amsel et al., arXiv:2505.16932, algorithm 1:
optimal for singular values from 1e-3 to 1, with a safety factor of 1.01) as rounded in NVIDIA's Emerging-Optimizers (Apache-2.0).

Each step multiplies by a symmetric matrix, which is made by two products that are symmetric themselves: on GPUs in BF16, a Triton kernel
computes one half of these and adds what belongs to them before it rounds.

Letters: N matrices, M rows, K columns of each, S the shorter of the two.
"""

import torch
from torch import Tensor

COEFFICIENTS = (
    (8.2051, -22.9019, 16.4607),
    (4.0664, -2.8612, 0.5184),
    (3.9096, -2.8234, 0.5250),
    (3.2856, -2.4153, 0.4853),
    (2.2779, -1.6198, 0.3985),
)
"""Of x, x^3 and x^5, one row for each step."""
TINIEST = 1e-15
"""Norm below which a matrix is not enlarged to norm 1, nor a sum divided by."""


def polar_factors(x_NMK: Tensor, squares_N: Tensor) -> Tensor:
    """Approximate polar factors [N, M, K] in the dtype of `x_NMK`; of a matrix of zeros, zeros.

    Args:
        squares_N: squared Frobenius norm of each matrix, FP32.
    """
    is_tall = x_NMK.size(1) > x_NMK.size(2)
    # Divided by its Frobenius norm, a matrix has no singular value over 1. The products of the first step see to that.
    over_norm_N = squares_N.sqrt().clamp(min=TINIEST).reciprocal()
    for number, (a, b, c) in enumerate(COEFFICIENTS):
        wide_NSL = x_NMK.mT if is_tall else x_NMK
        is_first = number == 0
        gram_NSS = symmetric_product(wide_NSL, scale_N=over_norm_N.square() if is_first else None)
        inner_NSS = symmetric_product(gram_NSS, c, gram_NSS, b, a, over_norm_N if is_first else None)
        x_NMK = torch.bmm(x_NMK, inner_NSS) if is_tall else torch.bmm(inner_NSS, x_NMK)
    return x_NMK


def symmetric_product(
    x_NSL: Tensor,
    alpha: float = 1.0,
    added_NSS: Tensor | None = None,
    beta: float = 0.0,
    gamma: float = 0.0,
    scale_N: Tensor | None = None,
) -> Tensor:
    """scale (alpha x x^T + beta added + gamma 1) for each matrix [N, S, S], in the dtype of `x_NSL`.

    Args:
        x_NSL: rows or columns are contiguous.
        added_NSS: symmetric; None: nothing is added.
        scale_N: FP32; None: 1.
    """
    if x_NSL.is_cuda and x_NSL.dtype == torch.bfloat16:
        from yxanul_nemo.kernels.symmetric_product import launch

        return launch(x_NSL, alpha, added_NSS, beta, gamma, scale_N)
    out_NSS = torch.bmm(x_NSL, x_NSL.mT)
    out_NSS.mul_(alpha)
    if added_NSS is not None:
        out_NSS.add_(added_NSS, alpha=beta)
    out_NSS.diagonal(dim1=1, dim2=2).add_(gamma)
    return out_NSS if scale_N is None else out_NSS.mul_(scale_N[:, None, None])
