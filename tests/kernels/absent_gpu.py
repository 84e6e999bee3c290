"""Triton kernels compiled for a GPU that is not here, from the launches of the project's own code: the interpreter takes what the compiler
refuses, and CI has no GPU."""

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class AbsentGpu:
    """As much of Triton's driver as compiling asks for."""

    def __init__(self, capability: tuple[int, int]):
        self.target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)

    def get_current_target(self) -> GPUTarget:
        """What is compiled for."""
        return self.target

    def get_current_device(self) -> int:
        """The first, and only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """None, as nothing is launched."""
        return 0


def compile_launches(capability: tuple[int, int], work: Callable[[], Any]) -> list[CompiledKernel]:
    """Every kernel that `work` would launch, with its tensors on the CPU. Nothing is computed, and no kernel of this process can run
    afterwards."""
    compiled: list[CompiledKernel] = []
    run = JITFunction.run

    def compile_only(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled.append(run(kernel, *args, grid=grid, warmup=True, **options))

    JITFunction.run = compile_only
    driver.set_active(AbsentGpu(capability))
    work()
    return compiled


def spilled_bytes(kernel: CompiledKernel) -> int:
    """Bytes per thread that the assembler keeps in memory for want of registers: stored, by its own report."""
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(kernel.asm["ptx"])
        target = re.search(r"^\.target (sm_\w+)", kernel.asm["ptx"], re.MULTILINE).group(1)
        command = [triton.knobs.nvidia.ptxas.path, "-v", f"--gpu-name={target}", str(ptx), "-o", f"{folder}/kernel"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return max(int(stored) for stored in re.findall(r"(\d+) bytes spill stores", report))
