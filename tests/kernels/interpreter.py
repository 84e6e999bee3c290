"""Triton's interpreter for kernel tests on a CPU."""

import os
import subprocess
import sys
from typing import Any


def run_interpreted(test_file: str, *arguments: object) -> str:
    """What `interpreted(*arguments)` of a test file prints. Triton decides at import whether its kernels are compiled or interpreted, so
    this needs a process of its own.

    Args:
        arguments: whose `repr` is Python for them.
    """
    code = (
        "import runpy; from tests.kernels.interpreter import take_scalars; take_scalars(); "
        f"runpy.run_path({test_file!r})['interpreted'](*{arguments!r})"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


class _IntOfArrays(type):
    def __instancecheck__(cls, x: object) -> bool:
        return isinstance(x, int)

    def __call__(cls, x: Any) -> int:
        return int(x.item()) if hasattr(x, "item") else int(x)


class _Int(metaclass=_IntOfArrays):
    """`int`, also of arrays with one element and a dimension."""


def take_scalars() -> None:
    """Have Triton 3.6's interpreter take loop bounds, which it keeps in such arrays: NumPy 2.5 no longer makes numbers of them."""
    from triton.runtime import interpreter

    interpreter.int = _Int
