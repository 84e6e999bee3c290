"""Triton's interpreter for kernel tests on a CPU."""

import os
import subprocess
import sys


def run_interpreted(test_file: str) -> str:
    """What `interpreted()` of a test file prints. Triton decides at import whether its kernels are compiled or interpreted, so this
    needs a process of its own."""
    code = f"import runpy; runpy.run_path({test_file!r})['interpreted']()"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
