"""What was fetched for a run's corpus, written down beside it."""

from pathlib import Path

from pydantic import ValidationError

from yxanul_nemo.config.data import HubFiles
from yxanul_nemo.errors import UserError
from yxanul_nemo.files import write_text_atomic
from yxanul_nemo.stored import Stored, first_problem


class FetchedFile(Stored):
    """One file of a source."""

    path: str
    """In the data set."""
    bytes: int
    digest: str
    """SHA-256, or git's SHA-1 of a small file, as the hub states it and the file has it."""
    shard: str
    """Name of the parquet file made of it, in the source's folder."""
    text_bytes: int
    """Of the text column, before compression."""


class FetchedSource(Stored):
    """One source of a corpus, fetched."""

    repo: str
    revision: str
    """As the configuration names it."""
    commit: str
    """The commit that this was."""
    pattern: str
    """`files` of the configuration."""
    license: str
    column: str
    files: list[FetchedFile]
    is_all: bool
    """Whether the data set has no more files of the pattern."""

    @property
    def text_bytes(self) -> int:
        """Text of all files."""
        return sum(file.text_bytes for file in self.files)

    def is_of(self, hub: HubFiles, column: str) -> bool:
        """Whether these are files of what the configuration names."""
        asked = (hub.repo, hub.revision, hub.files, column)
        return (self.repo, self.revision, self.pattern, self.column) == asked

    def is_present(self, folder: Path) -> bool:
        """Whether each shard is in `folder`, itself or as a link that leads somewhere."""
        return all((folder / file.shard).is_file() for file in self.files)

    @classmethod
    def load(cls, folder: Path) -> "FetchedSource | None":
        """The record of a source's folder, None if there is none; UserError if it is damaged."""
        path = _record_path(folder)
        if not path.is_file():
            return None
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise UserError(
                path, f"is damaged ({first_problem(error)})", fix=f"Delete it and {folder}, and fetch again."
            ) from None

    def save(self, folder: Path) -> None:
        """Write the record of a source's folder."""
        write_text_atomic(_record_path(folder), self.model_dump_json(indent=2) + "\n")


def _record_path(folder: Path) -> Path:
    """Beside the folder, in which there is nothing but shards."""
    return folder.with_name(f"{folder.name}.json")
