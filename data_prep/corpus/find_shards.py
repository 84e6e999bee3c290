"""Parquet files behind a source's path: a folder, a glob or a file. Each entry is taken, or named with the reason why not."""

import glob
import hashlib
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from yxanul_nemo.errors import UserError, nearest

LONGEST_STEM_BYTES = 230
"""Bytes of an output's name before what is added to it; file systems take 255 with that."""
CONVERT = (
    "`python -c \"import pyarrow.json, pyarrow.parquet; pyarrow.parquet.write_table(pyarrow.json.read_json('x.jsonl'), 'x.parquet')\"` "
    "makes parquet of a file of JSON lines."
)
COMPRESSED = "Unpack it first."
OTHER_FORMATS = {
    ".jsonl": CONVERT,
    ".json": CONVERT,
    ".gz": COMPRESSED,
    ".zst": COMPRESSED,
    ".zip": COMPRESSED,
    ".xz": COMPRESSED,
}
"""Ending of files that people have instead of parquet -> what to do about them."""


class NoShardsError(UserError):
    """There is no parquet file where a source's path points."""


@dataclass(frozen=True)
class InputShard:
    """One parquet file of a source and the name of what is made from it."""

    path: Path
    name: str
    """Path below the source's folder."""

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
    """The parquet files behind a source's `path`, as `find_shards`."""
    return find_shards(pattern, where).shards


def find_shards(pattern: str, where: str) -> FoundShards:
    """The parquet files behind a source's `path` (a folder, a glob, in which `**` spans folders, or one file), sorted.

    Of a folder these are the files whose names end in `.parquet`, and those in folders of such names, as Spark writes them; names that
    begin with a dot or an underscore are left out. `where` is the key to name in errors.

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
        return FoundShards([InputShard(path, path.name)], [])
    elif glob.has_magic(pattern):
        root, left_out = _fixed_root(path), []
        files = [Path(name) for name in _glob(str(path))]
    else:
        raise _absent(path, pattern, where)
    shards: dict[str, InputShard] = {}
    for file in sorted(_expanded(files, where)):
        shard = InputShard(file, file.relative_to(root).as_posix())
        if any(_is_hidden(part) for part in Path(shard.name).parts):
            continue
        if file.is_dir():
            left_out.append(f"{shard.name} (a folder)")
            continue
        _require_name(file, where)
        if shard.stem in shards:
            clash = f"{shards[shard.stem].path} and {file} would both be written as {shard.stem}"
            raise UserError(where, clash, "distinct names")
        shards[shard.stem] = shard
    if not shards:
        raise NoShardsError(
            where,
            f"{pattern} has no parquet files",
            "at least one *.parquet, not named with . or _",
            _where_else(path, pattern, where),
        )
    return FoundShards([shards[stem] for stem in sorted(shards)], left_out)


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
            raise UserError(where, f"{file} is neither a file nor a folder", "parquet files")
        else:
            yield file


def _has_ending(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "_"))


def _other(entry: Path) -> str:
    """A neighbour of shards that is not read, and why."""
    if entry.is_dir():
        deeper = any(_has_ending(Path(name)) for name in _glob(f"{glob.escape(str(entry))}/**"))
        return f"{entry.name}/ (a folder{' with parquet files' if deeper else ''})"
    return f"{entry.name} (its name does not end in .parquet)"


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
    return NoShardsError(where, f"{pattern} does not exist", "a folder with *.parquet, a glob or a file", hint)


def _where_else(path: Path, pattern: str, where: str) -> str:
    """What would find shards where the path as it stands finds none."""
    if path.is_dir():
        deeper = f"{glob.escape(str(path))}/**/*.parquet"
        if any(_glob(deeper)):
            return f"Its subfolders have some: use {where}={shlex.quote(deeper)}."
        others = sorted({entry.suffix.lower() for entry in path.iterdir() if entry.suffix.lower() in OTHER_FORMATS})
        return f"It has files of {', '.join(others)}. {OTHER_FORMATS[others[0]]}" if others else ""
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
