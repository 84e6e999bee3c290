"""Putting a finished folder in the place of an older one, so that a kill at any moment loses neither. Light, for the launcher."""

import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypedDict

from yxanul_nemo.files import fsync_dir, sha256_file

OLD_SUFFIX = ".old"
HASH_THREADS = 2
"""Beside a proof, which has the other cores; there are two large files."""


class FileRecord(TypedDict):
    """A file of an export, as `export.json` has it."""

    bytes: int
    sha256: str


def list_files(folder: Path, paths: Iterable[Path] | None = None) -> dict[str, FileRecord]:
    """Return size and SHA-256 of every file below `folder`, or of `paths` among them, by relative path."""
    files = [path for path in sorted(folder.rglob("*") if paths is None else paths) if path.is_file()]
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        # hashlib releases the interpreter lock.
        hashes = list(pool.map(sha256_file, files))
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(files, hashes, strict=True)
    }


def list_and_sync(folder: Path) -> dict[str, FileRecord]:
    """Do `list_files` and `sync_folder`, for a thread beside other work."""
    files = list_files(folder)
    sync_folder(folder)
    return files


def sync_folder(folder: Path) -> None:
    """Make everything below `folder` durable."""
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            fsync_dir(path)
        else:
            with open(path, "rb") as handle:
                os.fsync(handle.fileno())
    fsync_dir(folder)


def replace_folder(new: Path, place: Path) -> None:
    """Put `new` where `place` is. After a kill, either folder is in place, or `recover_folder` puts the old one back."""
    recover_folder(place)
    old = place.with_name(place.name + OLD_SUFFIX)
    if place.exists():
        place.rename(old)
    new.rename(place)
    fsync_dir(place.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(place: Path) -> None:
    """Undo a `replace_folder` that was killed half-way."""
    old = place.with_name(place.name + OLD_SUFFIX)
    if not old.exists():
        return
    if place.exists():
        shutil.rmtree(old)
    else:
        old.rename(place)
        fsync_dir(place.parent)
