"""Files behind a source's path: a folder, a glob or a file. Each entry is taken, or named with the reason why not."""

import glob
import hashlib
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.corpus.formats import ALL_ENDINGS, Format, format_of
from yxanul_nemo.errors import UserError, nearest

LONGEST_STEM_BYTES = 230
"""Bytes of an output's name before what is added to it; file systems take 255 with that."""
MOST_TEXT_BYTES, MOST_TEXT_FILES = 32 << 20, 4096
"""Text files that are one shard come to at most so many bytes, unless one alone is larger, and are at most so many."""
COMPRESSED = "Unpack it first."
ARCHIVES = (".zip", ".xz", ".tar", ".tgz", ".gz", ".zst", ".7z")
"""Endings of files that hold others, which are not looked into."""


class NoShardsError(UserError):
    """There is no file with text where a source's path points."""


@dataclass(frozen=True)
class InputShard:
    """One file of a source, or several text files, and the name of what is made from them."""

    paths: tuple[Path, ...]
    """More than one for text files only."""
    name: str
    """Path below the source's folder, or the number of a group of text files."""
    kind: Format = Format.PARQUET

    @property
    def where(self) -> str:
        """The file, or the first and the last of several, for messages."""
        return str(self.paths[0]) if len(self.paths) == 1 else f"{self.paths[0]} to {self.paths[-1].name}"

    @property
    def stem(self) -> str:
        """Name of the outputs: `name` without its ending, folders joined by `--`; cut short, with a hash, where no file could have it."""
        stem = "--".join((*Path(self.name).parts[:-1], Path(self.name).stem))
        whole = stem.encode()
        if len(whole) <= LONGEST_STEM_BYTES:
            return stem
        digest = hashlib.blake2b(self.name.encode(), digest_size=8).hexdigest()
        return f"{whole[: LONGEST_STEM_BYTES - len(digest) - 1].decode(errors='ignore')}-{digest}"


@dataclass(frozen=True)
class FoundShards:
    """What is behind a source's `path`."""

    shards: list[InputShard]
    left_out: list[str]
    """Names of other files and folders in the folder, or that fit the glob, each with the reason."""


def resolve_shards(pattern: str, where: str) -> list[InputShard]:
    """Return the shards behind a source's `path`, as `find_shards`."""
    return find_shards(pattern, where).shards


def find_shards(pattern: str, where: str) -> FoundShards:
    """Return what is behind a source's `path` (a folder, a glob, in which `**` spans folders, or one file), sorted.

    Of a folder these are the files whose names have an ending of `formats`, and those in folders named `x.parquet`, as Spark writes
    them; names that begin with a dot or an underscore are left out. A source has one format: where there are several, the one with
    the most bytes is taken and the others are left out. Text files are joined into shards, in the order of their names.
    `where` is the key to name in errors.

    Raises NoShardsError if there is none, and UserError if one is a link to nothing, or if two would write to the same output.
    """
    try:
        path = Path(pattern).expanduser()
    except RuntimeError as error:
        raise UserError(where, f"{pattern} names a home folder that is not known ({error})", "a path") from None
    root = path
    if path.is_dir():
        try:
            entries = sorted(path.iterdir())
        except OSError as error:
            raise UserError(
                where, f"{pattern} cannot be read ({error.strerror})", "a folder that can be read"
            ) from None
        left_out = [_other(entry) for entry in entries if not _has_ending(entry) and not _is_hidden(entry.name)]
        files = [entry for entry in entries if _has_ending(entry)]
    elif path.is_file():
        return FoundShards([InputShard((path,), path.name, format_of(path.name) or Format.PARQUET)], [])
    elif glob.has_magic(pattern):
        root, left_out = _fixed_root(path), []
        files = [Path(name) for name in _glob(str(path))]
    else:
        raise _absent(path, pattern, where)
    found: list[tuple[Path, str]] = []
    for file in sorted(_expanded(files, where)):
        name = file.relative_to(root).as_posix()
        if any(_is_hidden(part) for part in Path(name).parts):
            continue
        if file.is_dir():
            left_out.append(f"{name} (a folder)")
            continue
        _require_name(file, where)
        found.append((file, name))
    if not found:
        raise NoShardsError(
            where,
            f"{pattern} has no files with text",
            f"at least one of {ALL_ENDINGS}, not named with . or _",
            _where_else(path, pattern, where),
        )
    kinds = {name: format_of(name) or Format.PARQUET for _, name in found}
    kind_bytes: Counter[Format] = Counter()
    for file, name in found:
        kind_bytes[kinds[name]] += file.stat().st_size if len(set(kinds.values())) > 1 else 0
    kind = max(Format, key=lambda one: (one in kind_bytes, kind_bytes[one]))
    left_out += [f"{name} (beside files of {kind})" for _, name in found if kinds[name] is not kind]
    found = [(file, name) for file, name in found if kinds[name] is kind]
    if kind is Format.TEXT and len(found) > 1:
        return FoundShards(_joined([file for file, _ in found]), left_out)
    shards: dict[str, InputShard] = {}
    for file, name in found:
        shard = InputShard((file,), name, kind)
        if shard.stem in shards:
            clash = f"{shards[shard.stem].where} and {file} would both be written as {shard.stem}"
            raise UserError(where, clash, "distinct names")
        shards[shard.stem] = shard
    return FoundShards([shards[stem] for stem in sorted(shards)], left_out)


def _joined(files: list[Path]) -> list[InputShard]:
    """Join text files, in their order, into shards of a size that is worth a pair of outputs."""
    groups: list[list[Path]] = []
    held_bytes = 0
    for file in files:
        size = file.stat().st_size
        if not groups or held_bytes + size > MOST_TEXT_BYTES or len(groups[-1]) == MOST_TEXT_FILES:
            groups.append([])
            held_bytes = 0
        groups[-1].append(file)
        held_bytes += size
    return [InputShard(tuple(group), f"texts-{number:05d}", Format.TEXT) for number, group in enumerate(groups)]


def _expanded(files: list[Path], where: str) -> Iterator[Path]:
    """The files, with what is in folders named like one. Raises UserError for links to nothing and what is no file."""
    for file in files:
        if file.is_dir() and _has_ending(file):
            inside = [entry for entry in file.iterdir() if _has_ending(entry) and not _is_hidden(entry.name)]
            if not inside and not _is_hidden(file.name):
                raise UserError(where, f"{file} is a folder without parquet files", "files, or folders of them")
            yield from _expanded(inside, where)
        elif file.is_symlink() and not file.exists():
            target = file.readlink()
            raise UserError(
                where,
                f"{file} is a link to {target}, which does not exist",
                "a file",
                "Bring it back, as by downloading the data set again, or remove the link.",
            )
        elif file.exists() and not file.is_file() and not file.is_dir():
            raise UserError(where, f"{file} is neither a file nor a folder", "files with text")
        else:
            yield file


def _has_ending(path: Path) -> bool:
    """Return whether it is taken from a folder: by its ending, and a folder only where it is named like a parquet file."""
    kind = format_of(path.name)
    return kind is Format.PARQUET or (kind is not None and not path.is_dir())


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "_"))


def _other(entry: Path) -> str:
    """A neighbour of shards that is not read, and why."""
    if entry.is_dir():
        deeper = any(_has_ending(Path(name)) for name in _glob(f"{glob.escape(str(entry))}/**"))
        return f"{entry.name}/ (a folder{' with files of text' if deeper else ''})"
    return f"{entry.name} (its name has no ending of a format that is read)"


def _require_name(file: Path, where: str) -> None:
    try:
        str(file).encode()
    except UnicodeEncodeError:
        raise UserError(where, f"the name {os.fsencode(file)!r} is not UTF-8", "another name", "Rename it.") from None


def _absent(path: Path, pattern: str, where: str) -> NoShardsError:
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    close = nearest(path.name, names) if names else f"The folder {path.parent} is empty or absent."
    hint = "" if close.startswith("Valid") else close  # A whole folder's names would be no help.
    if re.fullmatch(r"[\w.-]+/[\w.-]+", pattern) and not path.parent.is_dir():
        hint = (
            f"If it is a data set of the Hugging Face hub: `hf download --repo-type dataset {pattern} --local-dir FOLDER` fetches it "
            "(--include for a part of it), and FOLDER is the path."
        )
    return NoShardsError(where, f"{pattern} does not exist", "a folder, a glob or a file", hint)


def _where_else(path: Path, pattern: str, where: str) -> str:
    """What would find shards where the path as it stands finds none."""
    if path.is_dir():
        inside = (Path(name) for name in _glob(f"{glob.escape(str(path))}/**"))
        ending = next((found.suffix for found in inside if found.is_file() and _has_ending(found)), None)
        if ending is not None:
            return f"Its subfolders have some: use {where}={shlex.quote(f'{glob.escape(str(path))}/**/*{ending}')}."
        others = sorted({entry.suffix.lower() for entry in path.iterdir() if entry.suffix.lower() in ARCHIVES})
        return f"It has files of {', '.join(others)}. {COMPRESSED}" if others else ""
    literal = next((part for part in (path, *path.parents) if glob.has_magic(part.name) and part.exists()), None)
    if literal is not None:
        meant = glob.escape(str(literal)) + pattern.removeprefix(str(literal))
        return f"{literal} is there, but brackets mean a choice of letters in a glob: use {where}={shlex.quote(meant)}."
    return ""


def _fixed_root(path: Path) -> Path:
    """Longest leading part of a glob without magic characters."""
    parts = []
    for part in path.parts[:-1]:
        if glob.has_magic(part):
            break
        parts.append(part)
    return Path(*parts)


def _glob(pattern: str) -> Iterator[str]:
    """As the shell finds it; unlike `Path.glob`, `**` goes through links to folders."""
    return glob.iglob(pattern, recursive=True)  # noqa: PTH207
