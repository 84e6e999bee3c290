"""Compiling Triton kernels for a GPU that is not here: the interpreter takes what the compiler refuses."""

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

HOPPER = GPUTarget("cuda", 90, 32)


def compile_for_hopper(
    kernel: triton.JITFunction, types: dict[str, str], constants: dict[str, Any], **options: int
) -> CompiledKernel:
    """A kernel down to machine code.

    Args:
        types: of its arguments, as Triton writes them (`*bf16`, `i32`, `tensordesc<bf16[64, 64]>`); pointers are on 16-byte boundaries.
        constants: its other arguments.
    """
    names = kernel.arg_names
    assert set(names) == set(types) | set(constants)
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name, type_ in types.items() if type_[0] == "*"},
    )
    return triton.compile(source, target=HOPPER, options=options)
