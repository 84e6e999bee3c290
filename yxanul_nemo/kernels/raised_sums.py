"""Sums of exponentials without a running maximum, for Triton kernels.

A running maximum is a reduction and a rescaling of the sums in every tile. Instead, exponentials are relative to the largest in a row's
first tile, raised by HEADROOM (in powers of two). FP32 sums stay finite as long as nothing later is 2^(HEADROOM + 100) times as likely;
where one passes SUM_LIMIT, its rows are to be summed again with their true maxima. What underflows is less likely than the first tile's
maximum by 2^62 and more, nothing to such a sum.
"""

import triton
import triton.language as tl

HEADROOM = tl.constexpr(64.0)
SUM_LIMIT = tl.constexpr(1e30)


@triton.jit
def passes_limit(sum_M):
    """Whether one of these sums is past the limit. Written so that NaN, too, counts as that."""
    return tl.max(tl.where(sum_M < SUM_LIMIT, 0, 1), 0) > 0
