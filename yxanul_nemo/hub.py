"""Files of the Hugging Face hub at a fixed commit, in the hub's own cache on this machine, checked by their hashes.

`HF_ENDPOINT` names another hub, `HF_TOKEN` gives access to private and gated data, `HF_HOME` moves the cache, and with `HF_HUB_OFFLINE=1`
only the cache is used. huggingface_hub is imported late, because only some commands need it.
"""

import errno
import hashlib
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from yxanul_nemo.disk_errors import disk_error
from yxanul_nemo.errors import UserError, nearest
from yxanul_nemo.files import HASH_CHUNK_BYTES, sha256_file
from yxanul_nemo.log import logger

if TYPE_CHECKING:
    from huggingface_hub import CachedRevisionInfo

RepoKind = Literal["dataset", "model"]
COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
TRIES = 2
"""Downloads of a file whose bytes are not those that the hub states."""
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass(frozen=True)
class HubFile:
    """One file of a repository."""

    path: str
    """Inside the repository."""
    size_bytes: int
    digest: str
    """SHA-256 of a large file, else the SHA-1 that git gives to its content; empty where the hub states none."""


class HubRepo:
    """One repository of the hub at one commit.

    Args:
        where: the key that names it, for messages.
        name: OWNER/NAME.
        revision: a commit, branch or tag.
        instead: what can be done without the hub, as a sentence.

    Raises:
        UserError: it does not exist, may not be read, or there is no network and the cache does not have it. So do the methods.
    """

    def __init__(self, where: str, name: str, revision: str, kind: RepoKind = "dataset", instead: str = ""):
        self.where, self.name, self.kind, self.instead = where, name, kind, instead
        self.offline = False
        self.commit = revision if COMMIT.fullmatch(revision) else self._resolve(revision)

    def files(self, patterns: Sequence[str]) -> list[HubFile]:
        """The files that match one of the patterns, in the order of their names; those in the cache where there is no network."""
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        def listed() -> list[HubFile]:
            entries = HfApi().list_repo_tree(self.name, recursive=True, revision=self.commit, repo_type=self.kind)
            return [
                HubFile(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id)
                for entry in entries
                if isinstance(entry, RepoFile)
            ]

        everything = self._from_hub(listed) if not self.offline else None
        if everything is None:
            self.offline = True
            everything = self._cached()
        found = [file for file in everything if any(fnmatchcase(file.path, pattern) for pattern in patterns)]
        if not found and self.offline:
            raise self._no_network("the cache has no such file")
        if not found:
            hint = nearest(patterns[0], [file.path for file in everything]) if len(patterns) == 1 else ""
            raise UserError(
                self.where,
                f"{self.name} at {self.commit[:12]} has no file {' or '.join(patterns)}",
                fix=hint if not hint.startswith("Valid") else "",
            )
        return sorted(found, key=lambda file: file.path)

    def download(self, file: HubFile) -> Path:
        """The file in the cache, whole and with the stated hash; what is there already is only checked."""
        for _ in range(TRIES):
            path = self._download(file)
            if matches(path, file):
                return path
            # The link of the commit and the content that it points to.
            path.resolve().unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        raise UserError(
            self.where,
            f"{file.path} of {self.name} came {TRIES} times with other bytes than the hub states ({file.digest[:12]}...)",
            "the same bytes",
            "A proxy or mirror may alter files; try without it, or another HF_ENDPOINT.",
        )

    def _download(self, file: HubFile) -> Path:
        import httpx2
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars

        if not sys.stderr.isatty():
            disable_progress_bars()
        try:
            with self._hub_errors():
                found = HfApi().hf_hub_download(self.name, file.path, revision=self.commit, repo_type=self.kind)
        except (httpx2.TransportError, OSError) as error:
            # The client has tried again by itself, several times, each time from the byte where the connection broke.
            raise self._no_network(f"{file.path} broke off ({_words(error)})") from None
        return Path(found)

    def _resolve(self, revision: str) -> str:
        from huggingface_hub import HfApi

        commit = self._from_hub(lambda: HfApi().repo_info(self.name, revision=revision, repo_type=self.kind).sha)
        if commit is None:
            self.offline = True
            # A download by commit leaves no trace of the branch it was asked for by.
            newest = max(self._revisions(), key=lambda known: known.last_modified, default=None)
            if newest is None:
                raise self._no_network("the cache has nothing of it")
            commit = newest.commit_hash
            logger.info("%s: the hub does not answer; taking commit %s from the cache", self.name, commit[:12])
        return commit

    def _from_hub[T](self, ask: Callable[[], T]) -> T | None:
        """What `ask` returns, or None if there is no network."""
        import httpx2
        from huggingface_hub.errors import OfflineModeIsEnabled

        try:
            with self._hub_errors():
                return ask()
        except (httpx2.TransportError, OfflineModeIsEnabled):
            return None

    def _revisions(self) -> list["CachedRevisionInfo"]:
        from huggingface_hub import scan_cache_dir
        from huggingface_hub.errors import CacheNotFound

        try:
            repos = scan_cache_dir(cache_dir()).repos
        except CacheNotFound:
            return []
        return [
            known
            for repo in repos
            if repo.repo_id == self.name and repo.repo_type == self.kind
            for known in repo.revisions
        ]

    def _cached(self) -> list[HubFile]:
        """The files of this commit that are in the cache; large ones are stored under their SHA-256."""
        return [
            HubFile(
                entry.file_path.relative_to(known.snapshot_path).as_posix(), entry.size_on_disk, entry.blob_path.name
            )
            for known in self._revisions()
            if known.commit_hash == self.commit
            for entry in known.files
        ]

    def _no_network(self, problem: str) -> UserError:
        return UserError(
            self.where,
            f"{self.name} cannot be fetched: the hub does not answer, and {problem}",
            "network access to the hub",
            "Repeat the command where there is network; HF_ENDPOINT names a mirror. What is fetched already is kept. "
            f"{self.instead}".rstrip(),
        )

    @contextmanager
    def _hub_errors(self) -> Iterator[None]:
        """Turn what the hub refuses into a UserError; a missing network passes, except from `hf_hub_download`, which waits for it."""
        from huggingface_hub import constants
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            LocalEntryNotFoundError,
            RemoteEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        page = f"{constants.ENDPOINT}/{'datasets/' if self.kind == 'dataset' else ''}{self.name}"
        try:
            yield
        except GatedRepoError:
            raise UserError(
                self.where,
                f"{self.name} is given only to those who accept its terms",
                "a token of an account that has",
                f"Accept them at {page}, and set HF_TOKEN or run `hf auth login`.",
            ) from None
        except RevisionNotFoundError:
            raise UserError(self.where, f"{self.name} has no such revision", f"a commit or branch of {page}") from None
        except RepositoryNotFoundError:
            raise UserError(
                self.where,
                f"{self.name} does not exist or is private",
                f"a {self.kind} of {constants.ENDPOINT}",
                "If it is private, set HF_TOKEN or run `hf auth login`.",
            ) from None
        except RemoteEntryNotFoundError as error:
            raise UserError(self.where, f"{self.name} at {self.commit[:12]} lacks a file ({_words(error)})") from None
        except LocalEntryNotFoundError as error:
            raise self._no_network(_words(error.__cause__ or error)) from None
        except HfHubHTTPError as error:
            raise UserError(
                self.where,
                f"{self.name}: the hub refuses ({_words(error)})",
                fix="Repeat the command later; what is fetched already is kept.",
            ) from None
        except OSError as error:
            if error.errno not in DISK_ERRORS:
                raise
            raise disk_error(
                error, cache_dir(), f"fetching {self.name}", "HF_HOME chooses another folder for what is fetched."
            ) from None


def matches(path: Path, file: HubFile) -> bool:
    """Whether a file has the stated size and hash."""
    if path.stat().st_size != file.size_bytes:
        return False
    if SHA256.fullmatch(file.digest):
        return sha256_file(path) == file.digest
    return not COMMIT.fullmatch(file.digest) or _git_sha1(path) == file.digest


def cache_dir() -> Path:
    """The hub's cache on this machine."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def free_bytes(folder: Path) -> int:
    """Free space of the disk that a folder is on, or will be."""
    existing = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.is_dir())
    return shutil.disk_usage(existing).free


def _git_sha1(path: Path) -> str:
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with open(path, "rb") as handle:
        while chunk := handle.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _words(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
