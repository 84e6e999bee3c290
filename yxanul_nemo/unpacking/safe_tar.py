"""Unpacking `.nemo` files that somebody else made: nothing is written outside the target, nothing at all on refusal.

A `.nemo` file is a tar (plain, or gzip in old releases) with a YAML configuration, weights and a tokenizer. It is read
here once, forwards, header by header: `tarfile` follows links, sparse maps and extension headers before its caller can
refuse them (CVE-2007-4559, CVE-2025-4517, CVE-2025-8194), so only its parser of a single 512-byte header is used.
Format: POSIX.1-2001, pax, "ustar Interchange Format". What is inside the configuration is `safe_config`'s business.
"""

import os
import re
import shutil
import stat
import tarfile
import tempfile
import unicodedata
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO, NoReturn

from yxanul_nemo.disk_errors import disk_errors
from yxanul_nemo.errors import UserError
from yxanul_nemo.files import fsync_dir

BLOCK_BYTES = 512
CHUNK_BYTES = 1 << 20
MAX_NAME_BYTES = 200
MAX_PAX_BYTES = 8192
MAX_PADDING_BYTES = 1 << 20
"""Zeros after the end mark: tar pads to its record size, 10 KiB unless told otherwise."""
PAX_KEYS = frozenset({"path", "size", "mtime", "atime", "ctime", "uid", "gid", "uname", "gname"})
"""Extension records that describe a plain file. Others change what a member is (linkpath, GNU.sparse.*, hdrcharset)."""


CheckMember = Callable[[str, int, Path], None]
"""Called with a member's path and size in bytes and the folder of those unpacked before it; refuses it by raising."""


def safe_extract(
    archive: Path,
    target: Path,
    allowed: Sequence[str],
    max_total_bytes: int = 16 << 30,
    max_members: int = 256,
    check_member: CheckMember | None = None,
) -> list[str]:
    """Unpack `archive` into the new folder `target`, whole or not at all.

    Args:
        archive: a tar, plain or gzip.
        target: a folder that does not exist or is empty; its parent exists.
        allowed: names of members, with shell wildcards that stay within one path component, as in `*.model`.
        max_total_bytes: largest sum of the unpacked files.
        max_members: most headers, folders and extension headers included.
        check_member: what else must hold for a member before any of it is unpacked.

    Returns:
        Names of the unpacked files, as paths relative to `target`, in the archive's order.

    Raises:
        UserError: the archive is damaged or holds anything other than plain files of these names and sizes: links,
            devices, sparse files, absolute or `..` paths, names twice (also if only case, `./` or Unicode form differ),
            data after its end. `target` is then as before. Also if the disk cannot be written.
    """
    archive, target = Path(archive), Path(target)
    _require_new(target)
    with _opened(archive) as handle, disk_errors(target, f"unpacking {archive.name}"):
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
        try:
            unpacker = _Unpacker(archive, staging, tuple(allowed), max_total_bytes, max_members, check_member)
            max_overhead_bytes = MAX_PADDING_BYTES + (max_members + 2) * (MAX_PAX_BYTES + 3 * BLOCK_BYTES)
            unpacker.run(_Stream(archive, handle, max_total_bytes + max_overhead_bytes))
            staging.chmod(0o755)
            staging.rename(target)
        except BaseException:
            shutil.rmtree(staging)
            raise
        fsync_dir(target.parent)
    return unpacker.files


def _refuse(archive: Path, problem: str) -> NoReturn:
    raise UserError(
        archive, problem, "a .nemo file with plain files only", "Do not use this file; get it from its maker."
    )


def _require_new(target: Path) -> None:
    if not target.parent.is_dir():
        raise UserError(target.parent, "is not a folder", "the folder in which to unpack")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UserError(target, "exists and is not a folder", "a new folder to unpack into")
    if target.is_dir() and any(target.iterdir()):
        raise UserError(target, "is not empty", "a new or empty folder to unpack into")


@contextmanager
def _opened(archive: Path) -> Iterator[BinaryIO]:
    try:
        # Without O_NONBLOCK the opening of a named pipe would wait for a writer for ever.
        fd = os.open(archive, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise UserError(archive, f"cannot be opened ({error.strerror})", "a .nemo file") from None
    except ValueError as error:
        raise UserError(archive, f"cannot be opened ({error})", "a .nemo file") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise UserError(archive, "is not a regular file", "a .nemo file")
    with open(fd, "rb") as handle:
        yield handle


class _Stream:
    """The archive's bytes after decompression, forwards, never more than `max_bytes` of them."""

    def __init__(self, archive: Path, handle: BinaryIO, max_bytes: int):
        self.archive, self._handle, self._left_bytes = archive, handle, max_bytes
        magic = handle.read(2)
        handle.seek(0)
        self._gzip = zlib.decompressobj(wbits=31) if magic == b"\x1f\x8b" else None

    def read(self, size_bytes: int) -> bytes:
        """Up to `size_bytes` bytes; fewer only at the end."""
        data = self._handle.read(size_bytes) if self._gzip is None else self._inflate(size_bytes)
        self._left_bytes -= len(data)
        if self._left_bytes < 0:
            _refuse(self.archive, "unpacks to more bytes than allowed")
        return data

    def exactly(self, size_bytes: int) -> bytes:
        """`size_bytes` bytes."""
        data = self.read(size_bytes)
        if len(data) != size_bytes:
            _refuse(self.archive, "is truncated")
        return data

    def _inflate(self, size_bytes: int) -> bytes:
        assert self._gzip is not None
        parts, missing = [], size_bytes
        while missing and not self._gzip.eof:
            packed = self._gzip.unconsumed_tail or self._handle.read(CHUNK_BYTES)
            try:
                part = self._gzip.decompress(packed, missing)
            except zlib.error as error:
                _refuse(self.archive, f"is damaged ({error})")
            if not packed and not part:
                _refuse(self.archive, "is truncated")
            parts.append(part)
            missing -= len(part)
        if self._gzip.eof and (self._gzip.unused_data or self._handle.read(1)):
            _refuse(self.archive, "has data after the end of its gzip stream")
        return b"".join(parts)


@dataclass
class _Unpacker:
    archive: Path
    staging: Path
    allowed: tuple[str, ...]
    max_total_bytes: int
    max_members: int
    check_member: CheckMember | None
    files: list[str] = field(default_factory=list)
    _total_bytes: int = 0
    _kinds: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Folded path -> (path, "file", "folder" or, for a folder without a header of its own, "parent")."""

    def run(self, stream: _Stream) -> None:
        """Read the whole archive."""
        extension: dict[str, str] | None = None
        for _ in range(self.max_members + 1):
            block = stream.exactly(BLOCK_BYTES)
            if not any(block):
                if extension is not None:
                    _refuse(self.archive, "has an extension header without a member")
                self._end(stream)
                return
            info = self._parse(block)
            if info.type == tarfile.XHDTYPE:
                if extension is not None:
                    _refuse(self.archive, "has two extension headers for one member")
                extension = self._extension(stream, info)
            else:
                self._member(stream, info, extension or {})
                extension = None
        _refuse(self.archive, f"has more than {self.max_members} members")

    def _end(self, stream: _Stream) -> None:
        if any(stream.exactly(BLOCK_BYTES)):
            _refuse(self.archive, "goes on after its end mark")
        padding_bytes = 0
        while data := stream.read(CHUNK_BYTES):
            padding_bytes += len(data)
            if any(data) or padding_bytes > MAX_PADDING_BYTES:
                _refuse(self.archive, "goes on after its end mark")
        if not self.files:
            _refuse(self.archive, "holds no files")

    def _parse(self, block: bytes) -> tarfile.TarInfo:
        if block[257:262] != b"ustar":
            _refuse(self.archive, "is not a tar file, or is damaged")
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            _refuse(self.archive, f"is damaged ({error})")
        if info.size < 0:
            _refuse(self.archive, f"has a member of negative size ({info.name!r})")
        return info

    def _extension(self, stream: _Stream, info: tarfile.TarInfo) -> dict[str, str]:
        if info.size > MAX_PAX_BYTES:
            _refuse(self.archive, f"has an extension header of {info.size} bytes")
        data = stream.exactly(_padded(info.size))[: info.size]
        records: dict[str, str] = {}
        while data:
            match = re.match(rb"([1-9][0-9]{0,4}) ([^=\0]{1,64})=", data)
            length = int(match[1]) if match else 0
            if match is None or not match.end() < length <= len(data) or data[length - 1 : length] != b"\n":
                _refuse(self.archive, "has a damaged extension header")
            key = match[2].decode(errors="replace")
            if key not in PAX_KEYS or key in records:
                _refuse(self.archive, f"has an extension record {key!r}, which is not allowed or there twice")
            records[key] = data[match.end() : length - 1].decode(errors="surrogateescape")
            data = data[length:]
        if not re.fullmatch(r"[0-9]{1,18}", records.get("size", "0"), re.ASCII):
            _refuse(self.archive, f"has a member of size {records['size']!r}")
        return records

    def _member(self, stream: _Stream, info: tarfile.TarInfo, extension: dict[str, str]) -> None:
        name, size_bytes = extension.get("path", info.name), int(extension.get("size", info.size))
        if info.type == tarfile.DIRTYPE:
            if size_bytes:
                _refuse(self.archive, f"has a folder with content ({name!r})")
            self._folder(name)
        elif info.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
            self._file(stream, name, size_bytes)
        else:
            _refuse(
                self.archive, f"has a member {name!r} of type {info.type!r} (link, device, sparse file or the like)"
            )

    def _folder(self, name: str) -> None:
        if name in (".", "./"):
            self._claim("", "folder")
            return
        path = self._checked(name.removesuffix("/"))
        depth = path.count("/") + 1
        if not any(_matches(path, "/".join(p.split("/")[:depth])) for p in self.allowed if p.count("/") >= depth):
            _refuse(self.archive, f"has an unknown member {name!r}")
        self._claim(path, "folder")
        (self.staging / path).mkdir(parents=True, exist_ok=True)

    def _file(self, stream: _Stream, name: str, size_bytes: int) -> None:
        path = self._checked(name)
        if not any(_matches(path, pattern) for pattern in self.allowed):
            _refuse(self.archive, f"has an unknown member {name!r}")
        self._claim(path, "file")
        self._total_bytes += size_bytes
        if self._total_bytes > self.max_total_bytes:
            _refuse(self.archive, f"unpacks to {self._total_bytes} bytes or more, {self.max_total_bytes} are allowed")
        if self.check_member is not None:
            self.check_member(path, size_bytes, self.staging)
        place = self.staging / path
        place.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644), "wb") as handle:
            left_bytes = size_bytes
            while left_bytes:
                chunk = stream.exactly(min(left_bytes, CHUNK_BYTES))
                handle.write(chunk)
                left_bytes -= len(chunk)
            handle.flush()
            os.fsync(handle.fileno())
        stream.exactly(_padded(size_bytes) - size_bytes)
        self.files.append(path)

    def _checked(self, name: str) -> str:
        """The member's path without a leading `./`, if it is a plain relative one."""
        if len(name.encode(errors="surrogateescape")) > MAX_NAME_BYTES:
            _refuse(self.archive, f"has a member with a name of over {MAX_NAME_BYTES} bytes")
        path = name.removeprefix("./")
        # Not printable: control characters, bytes that are not UTF-8, and characters that hide or reverse others.
        if not path.isprintable() or re.search(r"[\\:]", path) or set(path.split("/")) & {"", ".", ".."}:
            _refuse(self.archive, f"has a member with an unsafe path ({name!r})")
        return path

    def _claim(self, path: str, kind: str) -> None:
        """Take the path and its parents, so that no two members meet in one place on any file system."""
        parts = path.split("/")
        parents = ["/".join(parts[:depth]) for depth in range(1, len(parts))]
        for place, new_kind in [*((parent, "parent") for parent in parents), (path, kind)]:
            folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", place).casefold())
            old_place, old_kind = self._kinds.get(folded, (place, "parent"))
            if old_place != place or old_kind == "file" or (new_kind != "parent" and old_kind == "folder"):
                _refuse(self.archive, f"has the member {old_place!r} twice, or in the place of another ({path!r})")
            if new_kind == "file" and folded in self._kinds:
                _refuse(self.archive, f"has a file in the place of the folder {old_place!r}")
            self._kinds[folded] = (place, old_kind if new_kind == "parent" else new_kind)


def _matches(path: str, pattern: str) -> bool:
    parts, patterns = path.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def _padded(size_bytes: int) -> int:
    return -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES
