"""`stage=fetch`: what the recipe names on the Hugging Face hub: validation files, the tokenizer, and text to train on.

Everything goes through the hub's cache, which runs share. A run's folder gets links to it, a parquet copy of what is not parquet, and a
record. What is there already is not asked for again, so a repeated command needs no network.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.corpus.manifest import MANIFEST_NAME
from data_prep.corpus.shards import ShardReader
from data_prep.tokenizers.tokenizer import fetch_tokenizer
from yxanul_nemo.config.data import HubFiles, SourceConfig
from yxanul_nemo.config.outputs import DomainConfig
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.disk_errors import disk_errors
from yxanul_nemo.errors import UserError
from yxanul_nemo.fetch.needs import absent_domains, lacks_tokenizer, text_bytes_needed, text_per_byte
from yxanul_nemo.fetch.record import FetchedFile, FetchedSource
from yxanul_nemo.fetch.rows import JSON_ENDINGS, write_rows
from yxanul_nemo.figures import size
from yxanul_nemo.hub import HubFile, HubRepo, cache_dir, free_bytes
from yxanul_nemo.log import logger


def fetch_for_checks(config: RunConfig) -> None:
    """Get the small things: validation files that do not exist, and the files of the tokenizer.

    Raises:
        UserError: as `HubRepo`, or what came cannot be used.
    """
    for name, (path, domain) in absent_domains(config).items():
        _fetch_domain(path, f"validation.domains.{name}.hub", domain)
    tokenizer = config.tokenizer
    if lacks_tokenizer(config):
        _say(f"tokenizer {tokenizer.name}", str(tokenizer.hub_id), tokenizer.hub_revision, tokenizer.hub_license)
        fetch_tokenizer(tokenizer)


def fetch_sources(config: RunConfig) -> None:
    """Get the text of the corpus; nothing if it is prepared already. Raises as `fetch_for_checks`."""
    if (config.data_dir / MANIFEST_NAME).is_file():
        return
    needed = text_bytes_needed(config)
    for name, source in config.data.sources.items():
        if source.is_fetched:
            SourceFetch(config.fetched_dir / name, name, source, needed[name]).run()


def _fetch_domain(target: Path, where: str, domain: DomainConfig) -> None:
    assert domain.hub is not None
    repo = HubRepo(where, domain.hub.repo, domain.hub.revision)
    files = repo.files([domain.hub.files])
    _say(str(target), repo.name, repo.commit, domain.hub.license, files)
    _check_space(files, where)
    with disk_errors(target.parent, f"writing {target.name}"):
        write_rows([repo.download(file) for file in files], target, where, None, domain.hub_rows)


@dataclass
class SourceFetch:
    """One source of the corpus: which files it takes, and their way into its folder."""

    folder: Path
    name: str
    source: SourceConfig
    text_bytes_needed: int

    def is_done(self) -> bool:
        """Whether enough is here; UserError if the folder holds another data set."""
        before = self._before()
        return before is not None and before.is_present(self.folder) and self._is_enough(before)

    def run(self) -> None:
        """Get what is missing; the record is written after every file."""
        if self.is_done():
            return
        before = self._before()
        repo = HubRepo(self._where, self._hub.repo, before.commit if before else self._hub.revision)
        files = repo.files([self._hub.files])
        self._announce(repo, files)
        known = {file.path: file for file in before.files} if before else {}
        record = FetchedSource(
            repo=self._hub.repo,
            revision=self._hub.revision,
            commit=repo.commit,
            pattern=self._hub.files,
            license=self._hub.license,
            column=self.source.text_column,
            files=[],
            is_all=False,
        )
        for number, file in enumerate(files, start=1):
            old = known.get(file.path)
            fetched = old if old and (self.folder / old.shard).is_file() else self._fetch(repo, file, number)
            # In a file of the cache only, without network, the hub's list ends where the cache's does.
            record = record.model_copy(
                update={"files": [*record.files, fetched], "is_all": number == len(files) and not repo.offline}
            )
            with disk_errors(self.folder, "writing what was fetched"):
                record.save(self.folder)
            if self._is_enough(record):
                break
        if not self._is_enough(record):
            raise UserError(
                self._where,
                f"the hub does not answer, and its cache has {size(record.text_bytes)} of text for '{self.name}'",
                f"{size(self.text_bytes_needed)}, which the curriculum takes",
                "Repeat the command where there is network, or lower curriculum.total_tokens.",
            )
        if record.text_bytes < self.text_bytes_needed:
            times = self.text_bytes_needed / max(1, record.text_bytes)
            logger.info("%s: all of %s is fetched; it will be read about %.1f times", self.name, repo.name, times)

    @property
    def _hub(self) -> HubFiles:
        assert self.source.hub is not None
        return self.source.hub

    @property
    def _where(self) -> str:
        return f"data.sources.{self.name}.hub"

    def _is_enough(self, record: FetchedSource) -> bool:
        return record.is_all or record.text_bytes >= max(1, self.text_bytes_needed)

    def _before(self) -> FetchedSource | None:
        record = FetchedSource.load(self.folder)
        if record is None or record.is_of(self._hub, self.source.text_column):
            return record
        raise UserError(
            self._where,
            f"is {self._hub.repo} ({self._hub.files}, {self._hub.revision[:12]}), but {self.folder} has files of {record.repo} "
            f"({record.pattern}, {record.revision[:12]}, column {record.column})",
            "the same data set",
            f"Choose another run.dir or data.dir, or delete {self.folder}.",
        )

    def _announce(self, repo: HubRepo, files: Sequence[HubFile]) -> None:
        expected, text_bytes = [], 0.0
        for file in files:
            expected.append(file)
            text_bytes += file.size_bytes * text_per_byte(file.path)
            if text_bytes >= self.text_bytes_needed:
                break
        _say(f"source {self.name}", repo.name, repo.commit, self._hub.license, expected, of=len(files))
        _check_space(expected, self._where)

    def _fetch(self, repo: HubRepo, file: HubFile, number: int) -> FetchedFile:
        start = time.monotonic()
        cached = repo.download(file)
        stem = file.path
        for ending in (*JSON_ENDINGS, ".parquet"):
            stem = stem.removesuffix(ending)
        shard = self.folder / f"{stem.replace('/', '--')}.parquet"
        column = self.source.text_column
        with disk_errors(self.folder, "writing what was fetched"):
            self.folder.mkdir(parents=True, exist_ok=True)
            if file.path.endswith(JSON_ENDINGS):
                write_rows([cached], shard, self._where, [column], None)
            else:
                shard.unlink(missing_ok=True)
                shard.symlink_to(cached.absolute())
        with ShardReader(shard, column, self.source.ids_column) as reader:
            text_bytes = reader.column_bytes
        seconds = time.monotonic() - start
        logger.info("%s: file %d, %s, %s in %.0f s", self.name, number, file.path, size(file.size_bytes), seconds)
        return FetchedFile(
            path=file.path, bytes=file.size_bytes, digest=file.digest, shard=shard.name, text_bytes=text_bytes
        )


def require_fetched(config: RunConfig) -> None:
    """Refuse to prepare a corpus from files that are not all fetched.

    A prepared one needs them no more: where the hub's cache was cleared, the links into it go as well.
    """
    if (config.data_dir / MANIFEST_NAME).is_file():
        for name in config.data.sources:
            links = [path for path in (config.fetched_dir / name).glob("*.parquet") if path.is_symlink()]
            if not all(path.exists() for path in links):
                for path in links:
                    path.unlink()
        return
    needed = text_bytes_needed(config)
    for name, source in config.data.sources.items():
        if source.is_fetched and not SourceFetch(config.fetched_dir / name, name, source, needed[name]).is_done():
            assert source.hub is not None
            raise UserError(
                f"data.sources.{name}",
                f"{source.hub.repo} is not fetched yet",
                "its files",
                f"Run the command with stage=fetch where there is network, or give your own as data.sources.{name}.path=FOLDER.",
            )


def _say(
    what: str, repo: str, revision: str, license_name: str | None, files: Sequence[HubFile] = (), of: int | None = None
) -> None:
    """Say what is about to be fetched, before it is."""
    amount = (
        f", {size(sum(file.size_bytes for file in files))} in {len(files)} file{'s'[: len(files) > 1]}" if files else ""
    )
    amount += f" of {of}" if of is not None and of > len(files) else ""
    licence = license_name or "not stated"
    logger.info("fetching %s: %s at %s%s; licence: %s", what, repo, revision[:12], amount, licence)


def _check_space(files: Sequence[HubFile], where: str) -> None:
    folder = cache_dir()
    needed, free = sum(file.size_bytes for file in files), free_bytes(folder)
    if needed > free:
        raise UserError(
            where,
            f"needs {size(needed)}, and the disk of {folder} has {size(free)} free",
            "room for what is fetched",
            "Free some, set HF_HOME to a folder on another disk, or lower curriculum.total_tokens.",
        )
