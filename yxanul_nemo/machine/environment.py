"""`environment.json`: where and with what a run was made. Light: nothing here imports torch."""

import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from yxanul_nemo.config.conf_files import REPO_DIR
from yxanul_nemo.files import write_json_atomic
from yxanul_nemo.json_files import parse_json

PACKAGES = (
    "torch", "megatron-core", "nemo_toolkit", "transformer-engine", "lightning", "hydra-core",
    "transformers", "tokenizers", "sentencepiece", "safetensors", "pyarrow", "numpy",
)  # fmt: skip


def write_environment(path: Path) -> None:
    """Write `environment.json` for this command; what the file said of the run's commands before goes on under `earlier`."""
    try:
        before = parse_json(path.read_text(encoding="utf-8"))
        earlier = [*before.pop("earlier", []), before]
    except (FileNotFoundError, ValueError, AttributeError, TypeError):
        # Absent, or changed by hand to something else.
        earlier = []
    write_json_atomic(path, describe_environment() | {"earlier": earlier})


def describe_environment() -> dict[str, Any]:
    """Command, commit, versions and hardware of this process, as JSON-able values."""
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": platform.node(),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": _gpus(),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(command: list[str]) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _git(*arguments: str) -> str | None:
    if not (REPO_DIR / ".git").exists():
        # An installed package may lie inside a repository of somebody else.
        return None
    # A `git status` that is killed with its lock held would leave the user's repository locked.
    return _output(["git", "--no-optional-locks", "-C", str(REPO_DIR), *arguments])


def _gpus() -> list[str]:
    found = _output(["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"])
    return found.splitlines() if found else []


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
