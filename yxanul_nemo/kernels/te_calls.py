"""Transformer Engine's own kernels, called as its layers call them: cuBLAS's FP8 products, and the gradient of RMSNorm with an addition.

`general_gemm`, `Float8TensorStorage` and `rmsnorm_bwd_add` are exported and undocumented (2.20), so they are used in this module only.
Triton kernels for the norm's gradient reached 60% of memory's speed: its weight's gradient needs sums down the rows too.
"""

import torch
from torch import Tensor

from yxanul_nemo.kernels.layer_ops import Matrix


def product(x: Matrix, weight: Matrix, dtype: torch.dtype) -> Tensor:
    """x [tokens, in] times the transposed weight [out, in] -> [tokens, out], with fast accumulation."""
    return _gemm(weight, x, "TN", dtype, is_exact=False)


def input_gradient(dy: Matrix, weight: Matrix, dtype: torch.dtype) -> Tensor:
    """dy [tokens, out] times weight [out, in] -> [tokens, in]."""
    return _gemm(weight, dy, "NN", dtype, is_exact=True)


def weight_gradient(dy: Matrix, x: Matrix, dtype: torch.dtype, into: Tensor | None = None) -> Tensor:
    """dy transposed [out, tokens] times x [tokens, in] -> [out, in], added to `into` of that dtype where it is given."""
    return _gemm(x, dy, "NT", dtype, is_exact=True, into=into)


def norm_gradient(
    dnormed_TC: Tensor, total_TC: Tensor, rstd_T: Tensor, weight_C: Tensor, direct_TC: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Backward of `layer_ops.add_norm`.

    Args:
        dnormed_TC: gradient of the norm's result [tokens, width].
        total_TC, rstd_T: what `add_norm` gave.
        direct_TC: gradient of the residual stream from its other use; None: it has none.

    Returns:
        The gradient of y and of the residual, which is one [tokens, width], and that of the weight.
    """
    import transformer_engine_torch as tex

    margin, is_zero_centered = 0, False
    if direct_TC is None:
        return tex.rmsnorm_bwd(dnormed_TC, total_TC, rstd_T, weight_C, margin, is_zero_centered)
    return tex.rmsnorm_bwd_add(dnormed_TC, total_TC, direct_TC.contiguous(), rstd_T, weight_C, margin, is_zero_centered)


def _gemm(a: Matrix, b: Matrix, layout: str, dtype: torch.dtype, is_exact: bool, into: Tensor | None = None) -> Tensor:
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    # Sums are kept in FP32 outside the matrix unit where `is_exact`: its own have 14 bits.
    out, *_ = general_gemm(
        _storage(a),
        _storage(b),
        out_dtype=dtype,
        layout=layout,
        out=into,
        accumulate=into is not None,
        use_split_accumulator=is_exact,
        grad=layout != "TN",
    )
    return out


def _storage(matrix: Matrix) -> object:
    from transformer_engine.pytorch.constants import TE_DType
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

    some = matrix.rows if matrix.rows is not None else matrix.columns
    assert some is not None
    rows, columns = (None if x is None else x.view(torch.uint8) for x in (matrix.rows, matrix.columns))
    return Float8TensorStorage(
        data=rows,
        data_transpose=columns,
        fp8_scale_inv=matrix.scale_inv,
        fp8_dtype=TE_DType[some.dtype],
        fake_dtype=torch.bfloat16,
    )
