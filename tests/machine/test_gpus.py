"""GPUs as nvidia-smi reports them; a script stands for it where there are none."""

from pathlib import Path

import pytest

from yxanul_nemo.machine.gpus import found_gpus, read_power_watts

SCRIPT = """#!/bin/sh
case "$*" in
*--query-gpu=index,uuid,name*) printf '0, GPU-aa11, NVIDIA H100 80GB HBM3\\n1, GPU-bb22, NVIDIA GeForce RTX 4090\\n' ;;
*--query-gpu=power.draw*--id=GPU-aa11*) echo 73.10 ;;
*--query-gpu=power.draw*--id=GPU-bb22*) echo "[N/A]" ;;
*) exit 6 ;;
esac
"""
H100, RTX = "NVIDIA H100 80GB HBM3", "NVIDIA GeForce RTX 4090"


@pytest.fixture(autouse=True)
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "nvidia-smi"
    path.write_text(SCRIPT)
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, [H100, RTX]),
        ("1", [RTX]),
        ("1,0", [RTX, H100]),
        ("GPU-bb", [RTX]),
        ("", []),
        ("-1", []),
        ("0,7,1", [H100]),
        ("MIG-4d2b6e3a-1111-5555-9999-0123456789ab", ["a slice of a GPU, MIG-4d2b6e3a-1111-5555-9999-0123456789ab"]),
    ],
)
def test_those_that_cuda_would_show(monkeypatch: pytest.MonkeyPatch, visible: str | None, names: list[str]) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert found_gpus() == names


def test_power_is_that_of_the_gpu_asked_for() -> None:
    assert read_power_watts("GPU-aa11") == 73.1
    assert read_power_watts("GPU-bb22") is None
    assert read_power_watts("GPU-cc33") is None


def test_without_nvidia_smi_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert found_gpus() == [] and read_power_watts("GPU-aa11") is None
