"""What a process finds around it and may not be good for it: variables of other launchers, homes that cannot be written, busy cores."""

import importlib.util
import os
import pwd
import re
import socket
import stat
import sys
import tempfile
from collections.abc import MutableMapping
from pathlib import Path

OTHERS_PLACES = re.compile(
    r"RANK|WORLD_SIZE|(LOCAL|GROUP|ROLE|NODE)_(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*|PET_.*"
)
"""Variables by which torchrun and operators of jobs tell a process its place among others."""
CACHES = {
    "TRITON_CACHE_DIR": (".triton", "cache"),
    "TORCHINDUCTOR_CACHE_DIR": (),
    "TORCH_EXTENSIONS_DIR": (".cache", "torch_extensions"),
    "CUDA_CACHE_PATH": (".nv", "ComputeCache"),
    "HF_HUB_CACHE": (".cache", "huggingface", "hub"),
    "MPLCONFIGDIR": (".config", "matplotlib"),
}
"""Variable that moves a library's cache -> where the cache is below the home folder (nothing: elsewhere, under the user's name)."""
BYTECODE_CACHE = (".cache", "yxanul", "bytecode")
"""The same for `keep_bytecode`."""


def keep_bytecode(variables: MutableMapping[str, str]) -> None:
    """Have this process and those that it starts keep the bytecode of what they import in a cache, where Python is told to keep none.

    `PYTHONDONTWRITEBYTECODE` keeps folders of sources clean, which stays so. But where nothing was compiled at installation either, each
    process compiles torch and Megatron anew, which is more than half of a worker's start.
    """
    if not variables.get("PYTHONDONTWRITEBYTECODE") or variables.get("PYTHONPYCACHEPREFIX"):
        return
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None or Path(importlib.util.cache_from_source(torch.origin)).exists():
        return
    home = Path(variables.get("HOME") or _home_by_account() or "/nonexistent")
    folder = home.joinpath(*BYTECODE_CACHE) if _can_write(home) else _own_folder() / "bytecode"
    del variables["PYTHONDONTWRITEBYTECODE"]
    variables["PYTHONPYCACHEPREFIX"] = str(folder)
    sys.dont_write_bytecode, sys.pycache_prefix = False, str(folder)


def without_place(variables: MutableMapping[str, str]) -> dict[str, str]:
    """The variables without a place among processes that another launcher has given this one."""
    return {name: value for name, value in variables.items() if not OTHERS_PLACES.fullmatch(name)}


def free_port() -> int:
    """Return a port of this machine that no process listens on now, for rank 0 to listen on soon."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def make_bearable(variables: MutableMapping[str, str]) -> list[str]:
    """Set what is missing for the libraries of this process and of those that it starts; what is set already stays.

    - Threads of OpenMP sleep while they wait: on cores that others use too, those that spin keep the last one from its work.
    - Bytecode is kept (`keep_bytecode`).
    - Caches lie where they can be written, and a user without a name has one, by which libraries name folders.

    Returns:
        One sentence for each thing that the user may want to know.
    """
    keep_bytecode(variables)
    variables.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        variables.setdefault("USER", f"uid{os.getuid()}")
    home = Path(variables.get("HOME") or _home_by_account() or "/nonexistent")
    if _can_write(home):
        return []
    stand_in = _own_folder()
    moved = []
    for name, parts in CACHES.items():
        there = home.joinpath(*parts)
        # A hub's cache that can only be read may hold what is needed.
        serves = there.is_dir() if name == "HF_HUB_CACHE" else bool(parts) and _can_write(there)
        if name in variables or serves:
            continue
        variables[name] = str(stand_in / name.lower())
        moved.append(name)
    if not home.is_dir():
        variables["HOME"] = str(stand_in)
    if not moved:
        return []
    return [f"the home folder {home} cannot be written: caches of libraries are in {stand_in} ({', '.join(moved)})"]


def _home_by_account() -> str | None:
    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        return None


def _own_folder() -> Path:
    """The same folder in each process of this user, where nobody else has taken its name: what lies in caches is run."""
    folder = Path(tempfile.gettempdir()) / f"yxanul-caches-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022
    return folder if own else Path(tempfile.mkdtemp(prefix=folder.name))


def _can_write(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
