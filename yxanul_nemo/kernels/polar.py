"""The polar factor of many matrices at once: the nearest matrix whose singular values are all 1, by products alone.

An odd polynomial of a matrix is the same polynomial of its singular values. Five of fifth degree, one after another, bring all that are
not tiny near 1 (Newton-Schulz iteration). The coefficients are the first of Polar Express (Amsel et al., arXiv:2505.16932, algorithm 1:
optimal for singular values from 1e-3 to 1, with a safety factor of 1.01) as rounded in NVIDIA's Emerging-Optimizers (Apache-2.0).

Letters: N matrices, M rows, K columns of each.
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
TINIEST = 1e-30
"""Norm below which a matrix counts as zero."""


def polar_factors(x_NMK: Tensor, squares_N: Tensor) -> Tensor:
    """Approximate polar factors [N, M, K] in the dtype of `x_NMK`, which is overwritten; of a matrix of zeros, zeros.

    Args:
        squares_N: squared Frobenius norm of each matrix, FP32.
    """
    # No singular value is over the Frobenius norm.
    x_NMK.mul_(squares_N.sqrt().clamp(min=TINIEST).reciprocal()[:, None, None])
    is_tall = x_NMK.size(1) > x_NMK.size(2)
    for a, b, c in COEFFICIENTS:
        gram = torch.bmm(x_NMK.mT, x_NMK) if is_tall else torch.bmm(x_NMK, x_NMK.mT)
        inner = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        left, right = (x_NMK, inner) if is_tall else (inner, x_NMK)
        x_NMK = torch.baddbmm(x_NMK, left, right, beta=a)
    return x_NMK
