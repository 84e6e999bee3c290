"""What container/Dockerfile installs: the project's requirements without those that belong to an image's torch and CUDA."""

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "container" / "packages.py"


def output(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_torch_and_what_is_built_for_it_stay_as_they_are() -> None:
    provided = output("provided").stdout.split()
    assert f"torch=={version('torch')}" in provided and f"triton=={version('triton')}" in provided
    assert not any(line.startswith(("megatron-core", "numpy", "torchmetrics", "lightning")) for line in provided)
    missing = output("missing").stdout.splitlines()
    assert any(line.startswith("megatron-core==") for line in missing)
    assert any(line.startswith("nemo_toolkit[") for line in missing)
    assert not any(line.startswith("torch") for line in missing)


def test_a_replaced_package_fails_the_build(tmp_path: Path) -> None:
    kept = tmp_path / "provided.txt"
    kept.write_text(output("provided").stdout)
    assert output("check", kept).returncode == 0
    kept.write_text(f"torch==2.7.0a0+nv25.05\ntriton=={version('triton')}\n")
    done = output("check", kept)
    assert done.returncode == 1 and "replaced by pip: torch==2.7.0a0+nv25.05" in done.stderr
    assert "triton" not in done.stderr


def test_anything_else_is_answered_with_the_usage() -> None:
    assert output().returncode == output("chekc").returncode == 2


def test_both_images_are_made_by_the_same_steps() -> None:
    """Docker's and Apptainer's: the same base, the same commands of packages.py, and all that the launcher needs."""
    folder = SCRIPT.parents[1] / "container"
    docker, apptainer = ((folder / name).read_text(encoding="utf-8") for name in ("Dockerfile", "yxanul.def"))
    base = re.search(r"ARG BASE=(\S+)", docker)
    assert base is not None and f"From: {base[1]}\n" in apptainer
    steps = [
        re.findall(r"(?:python container/packages\.py|PIP_CONSTRAINT=) [^\\\n]+", text) for text in (docker, apptainer)
    ]
    assert [step.strip() for step in steps[0]] == [step.strip() for step in steps[1]] and len(steps[0]) == 4
    for source, _ in re.findall(r"^    (?!cd )(\S+) (/workspace/\S+)$", apptainer, re.MULTILINE):
        assert (SCRIPT.parents[1] / source).exists()
