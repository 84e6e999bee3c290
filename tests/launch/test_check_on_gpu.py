"""`stage=check` as a user runs it on a GPU machine."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu

REPO_DIR = Path(__file__).resolve().parents[2]
MXFP8_FROM = (10, 0)
"""Compute capability of Blackwell."""


@pytest.mark.parametrize("mask", ["false", "true"])
@pytest.mark.parametrize("tiles", ["false", "true"])
def test_the_recipe_of_a_hopper_gpu_can_run(tmp_path: Path, mask: str, tiles: str) -> None:
    command = [sys.executable, "launcher.py", "recipe=yxanul_197m_h100", f"run.dir={tmp_path / 'run'}", "stage=check"]
    # All lengths from 8 to 2048.
    command += ["curriculum=h100", f"data.document_mask={mask}", f"parallel.tiled_attention={tiles}"]
    done = subprocess.run(command, cwd=REPO_DIR, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "this recipe can run here" in said, said
    major, minor = map(int, re.search(r"compute capability (\d+)\.(\d+)", said).groups())
    for precision in ("fp32", "bf16", "fp8_hybrid", "fp8_e4m3", "fp8_current"):
        assert re.search(rf"precision {precision} +works", said), said
    assert bool(re.search(r"precision mxfp8 +works", said)) == ((major, minor) >= MXFP8_FROM)
    attention = dict(re.findall(r"seq_len +(\d+)(?: inside documents)?: (.*)", said))
    takes_tiles = tiles == "true" and torch.cuda.get_device_capability()[0] == 9
    by_tiles = {128, 256, 512, 768, 1536, 2048} if takes_tiles else set()
    of_kind = lambda wanted: {int(length) for length, kind in attention.items() if kind == wanted}  # noqa: E731
    assert of_kind("tiled kernels") == by_tiles
    assert of_kind("window kernel") == {8, 16, 32, 64, 128} - by_tiles
    assert not any("unfused" in kind or kind == "none" for kind in attention.values()), attention
    assert not (tmp_path / "run").exists(), "it only looks"
