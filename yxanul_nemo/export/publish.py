"""Putting a finished folder in the place of an older one, so that a kill at any moment loses neither. Light, for the launcher."""

import os
import shutil
from pathlib import Path

from yxanul_nemo.files import fsync_dir, sha256_file

OLD_SUFFIX = ".old"


def list_files(folder: Path) -> dict[str, dict[str, int | str]]:
    """Size and SHA-256 of every file below `folder`, by relative path."""
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


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
