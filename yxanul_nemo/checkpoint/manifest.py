"""The list of a checkpoint's files with their sizes and SHA-256, written last: what is not listed does not exist.

`manifest.json` carries a digest of itself and has one canonical form, so that a change of any of its bytes is seen too.
"""

import json
import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from yxanul_nemo.errors import UserError
from yxanul_nemo.files import fingerprint, fsync_dir, require_inside, sha256_file, write_text_atomic
from yxanul_nemo.json_files import parse_json
from yxanul_nemo.stored import Stored, first_problem

MANIFEST_NAME = "manifest.json"
LEDGER_NAME = "ledger.json"
MAX_MANIFEST_BYTES = 64 << 20
SMALL_FILE_BYTES = 1 << 20
"""Up to this size a file is hashed even where only sizes are to be checked: it costs nothing."""
DROPPINGS = (".nfs", ".DS_Store")
"""Beginnings of the names that file servers and file managers leave in any folder; no load reads such files."""
HASH_THREADS = min(8, os.cpu_count() or 1)

Verify = Literal["full", "size"]


class CorruptCheckpoint(UserError):
    """A checkpoint that must not be loaded; the message names the file and what is wrong with it."""

    def __init__(self, directory: Path, file: str, why: str):
        self.directory, self.file, self.why = directory, file, why
        super().__init__(directory / file, why, fix="Use another checkpoint, or restore this one from a copy.")

    def __reduce__(self) -> tuple[type[UserError], tuple[object, ...]]:
        """See `UserError`."""
        return CorruptCheckpoint, (self.directory, self.file, self.why)


def _canonical_path(path: str) -> str:
    require_inside(path)
    if not path.isprintable():
        raise ValueError(f"{path!r} has characters that cannot be shown")
    if path == MANIFEST_NAME:
        raise ValueError(f"{path!r} cannot list itself")
    return path


class FileEntry(Stored):
    """Size and content of one file."""

    size_bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(Stored):
    """What a checkpoint is and which files it has; keys of `files` are POSIX paths relative to its directory."""

    format: Literal["yxanul-checkpoint"] = "yxanul-checkpoint"
    format_version: Literal[1] = 1
    tokens: int = Field(ge=0)
    """Tokens consumed by the run."""
    phase: int = Field(ge=0)
    """Number of the curriculum's phase, counted from 1; 0 before the first."""
    phase_end: bool
    """Whether that phase was finished."""
    created_unix: float = Field(ge=0, allow_inf_nan=False)
    """Wall-clock time of the commit in seconds, for people; nothing is decided by it."""
    files: dict[Annotated[str, AfterValidator(_canonical_path)], FileEntry]

    @model_validator(mode="after")
    def _has_ledger(self) -> "Manifest":
        if LEDGER_NAME not in self.files:
            raise ValueError(f"{LEDGER_NAME} is not listed")
        return self

    @property
    def digest(self) -> str:
        """SHA-256 over all of the above: two checkpoints with the same digest have the same content."""
        return fingerprint(self.model_dump(mode="json"))

    def to_text(self) -> str:
        """The canonical text of `manifest.json`."""
        return json.dumps(self.model_dump(mode="json") | {"sha256": self.digest}, indent=1, ensure_ascii=False) + "\n"


def read_manifest(directory: Path) -> Manifest:
    """Read and validate `directory/manifest.json`; the files it lists are not looked at.

    Raises:
        CorruptCheckpoint: it is missing, unreadable, of another format, changed since it was written, or names files
            outside of the directory.
    """
    path = directory / MANIFEST_NAME
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as handle:
            raw = handle.read(MAX_MANIFEST_BYTES + 1)
    except FileNotFoundError:
        raise CorruptCheckpoint(directory, MANIFEST_NAME, "is missing, so the directory was never committed") from None
    except OSError as error:
        raise CorruptCheckpoint(directory, MANIFEST_NAME, f"cannot be read ({error.strerror})") from None
    if len(raw) > MAX_MANIFEST_BYTES:
        raise CorruptCheckpoint(directory, MANIFEST_NAME, f"is larger than {MAX_MANIFEST_BYTES} bytes")
    try:
        text = raw.decode()
        fields: Any = parse_json(text)
        if not isinstance(fields, dict):
            raise CorruptCheckpoint(directory, MANIFEST_NAME, "is not a JSON object")
        fields.pop("sha256", None)
        manifest = Manifest.model_validate(fields)
    except ValidationError as error:
        raise CorruptCheckpoint(directory, MANIFEST_NAME, f"is invalid ({first_problem(error)})") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, CorruptCheckpoint):
            raise
        raise CorruptCheckpoint(directory, MANIFEST_NAME, f"is not JSON ({error})") from None
    if manifest.to_text() != text:
        raise CorruptCheckpoint(
            directory, MANIFEST_NAME, "has changed since it was written (its own SHA-256 does not fit)"
        )
    return manifest


def seal(directory: Path, tokens: int, phase: int, phase_end: bool) -> Manifest:
    """Hash and fsync every file below `directory`, write the manifest last, and fsync all of its directories.

    Raises:
        OSError: the disk is full or the like.
        CorruptCheckpoint: something in it is no regular file.
    """
    (directory / MANIFEST_NAME).unlink(missing_ok=True)
    names = sorted(_regular_files(directory))
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        entries = list(pool.map(lambda name: _hash_and_sync(directory / name), names))
    manifest = Manifest(
        tokens=tokens,
        phase=phase,
        phase_end=phase_end,
        created_unix=time.time(),
        files=dict(zip(names, entries, strict=True)),
    )
    for folder, _, _ in os.walk(directory, topdown=False):
        fsync_dir(Path(folder))
    write_text_atomic(directory / MANIFEST_NAME, manifest.to_text())
    return manifest


def verify_files(directory: Path, manifest: Manifest, verify: Verify) -> None:
    """Compare the files below `directory` with `manifest`.

    `full` hashes every file; `size` looks at sizes, and hashes only files of up to `SMALL_FILE_BYTES`.

    Raises:
        CorruptCheckpoint: names a file that is missing, not in the manifest, of another size or changed.
    """
    found = _regular_files(directory)
    for name, entry in sorted(manifest.files.items()):
        if name not in found:
            raise CorruptCheckpoint(directory, name, "is missing")
        if found[name] != entry.size_bytes:
            raise CorruptCheckpoint(directory, name, f"has {found[name]} bytes instead of {entry.size_bytes}")
    for name in sorted(found.keys() - manifest.files.keys() - {MANIFEST_NAME}):
        if not name.rpartition("/")[2].startswith(DROPPINGS):
            raise CorruptCheckpoint(directory, name, "is not in the manifest; it was added after the commit")
    small = [name for name, entry in manifest.files.items() if entry.size_bytes <= SMALL_FILE_BYTES]
    for name in sorted(small):
        _check_digest(directory, name, manifest.files[name])
    large = sorted(manifest.files.keys() - set(small))
    if verify == "full" and large:
        with ThreadPoolExecutor(HASH_THREADS) as pool:
            # hashlib releases the interpreter lock, so threads hash at the speed of the disk.
            list(pool.map(lambda name: _check_digest(directory, name, manifest.files[name]), large))


def _check_digest(directory: Path, name: str, entry: FileEntry) -> None:
    try:
        digest = sha256_file(directory / name)
    except OSError as error:
        raise CorruptCheckpoint(directory, name, f"cannot be read ({error.strerror})") from None
    if digest != entry.sha256:
        raise CorruptCheckpoint(directory, name, "has changed since it was written (its SHA-256 does not fit)")


def _hash_and_sync(path: Path) -> FileEntry:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
        return FileEntry(size_bytes=os.fstat(fd).st_size, sha256=sha256_file(path))
    finally:
        os.close(fd)


def _regular_files(directory: Path) -> dict[str, int]:
    """Relative POSIX path -> size in bytes of all files below `directory`; links and special files are refused."""
    sizes: dict[str, int] = {}

    def unreadable(error: OSError) -> None:
        where = os.path.relpath(error.filename, directory)
        raise CorruptCheckpoint(directory, where, f"cannot be read ({error.strerror})")

    for folder, subfolders, files in os.walk(directory, onerror=unreadable):
        for name in (*subfolders, *files):
            path = Path(folder, name)
            mode = path.lstat()
            relative = path.relative_to(directory).as_posix()
            if stat.S_ISREG(mode.st_mode):
                sizes[relative] = mode.st_size
            elif not stat.S_ISDIR(mode.st_mode):
                raise CorruptCheckpoint(directory, relative, "is a link or special file, not a regular file")
    return sizes
