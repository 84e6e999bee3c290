"""Triton's interpreter for kernel tests on a CPU."""

import os
import subprocess
import sys
from typing import Any

import numpy as np
import torch

FP8 = {"fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2}
"""Triton's names."""


def run_interpreted(test_file: str, *arguments: object) -> str:
    """What `interpreted(*arguments)` of a test file prints. Triton decides at import whether its kernels are compiled or interpreted, so
    this needs a process of its own.

    Args:
        arguments: whose `repr` is Python for them.
    """
    code = (
        "import runpy; from tests.kernels.interpreter import mend; mend(); "
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


def mend() -> None:
    """Have Triton 3.6's interpreter take loop bounds, which it keeps in such arrays (NumPy 2.5 no longer makes numbers of them), and round
    to FP8 as GPUs do (it loses the carry where a number is rounded up to the next power of two)."""
    from triton.runtime import interpreter

    interpreter.int = _Int
    convert = interpreter._convert_float

    def convert_float(x: np.ndarray, source: Any, target: Any, rounding_mode: Any) -> np.ndarray:
        if str(source) != "fp32" or str(target) not in FP8:
            return convert(x, source, target, rounding_mode)
        limit = torch.finfo(FP8[str(target)]).max
        values = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)).clamp(-limit, limit)
        return values.to(FP8[str(target)]).view(torch.uint8).numpy()

    interpreter._convert_float = convert_float
