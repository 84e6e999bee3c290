"""`.nemo` files taken apart, changed and put together again, as NeMo packs them or as an attacker would."""

import io
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

CONFIG, WEIGHTS = "model_config.yaml", "model_weights.ckpt"


def repack(source: Path, target: Path, change: Callable[[Path], object]) -> Path:
    """Write `target` as `source` with its unpacked folder changed by `change`."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with tarfile.open(source) as archive:
            archive.extractall(folder, filter="data")
        change(folder)
        with tarfile.open(target, "w:") as archive:
            archive.add(folder, arcname=".")
    return target


def change_weights(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """For `repack`: change the state dict in place."""

    def apply(folder: Path) -> None:
        weights = torch.load(folder / WEIGHTS, weights_only=True)
        change(weights)
        torch.save(weights, folder / WEIGHTS)

    return apply


def change_config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """For `repack`: change the configuration in place."""

    def apply(folder: Path) -> None:
        config = yaml.safe_load((folder / CONFIG).read_text())
        change(config)
        (folder / CONFIG).write_text(yaml.safe_dump(config))

    return apply


def with_member(source: Path, target: Path, name: str, data: bytes = b"x") -> Path:
    """`target` is `source` and one more member of exactly this name."""
    target.write_bytes(source.read_bytes())
    with tarfile.open(target, "a:") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return target
