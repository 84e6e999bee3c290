"""What a prepared corpus consists of: `manifest.json`, written when everything is complete, and checked before anything is read."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from data_prep.corpus.indexed import TokenDtypeName, bin_path, idx_path, token_dtype_name
from yxanul_nemo.errors import UserError
from yxanul_nemo.files import fingerprint, read_bounded, require_inside, sha256_file, write_text_atomic
from yxanul_nemo.stored import Stored, first_problem

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION: Final = 1
SPLIT_RULE = (
    "held out if BLAKE2b of the document with a digest size of 8 bytes (another function than the first 8 bytes of a longer digest), "
    "read as a big-endian number, is below heldout_fraction * 2**64; the document is its UTF-8 text, or its ids without the last "
    "EOS as little-endian 64-bit integers"
)
MAX_MANIFEST_BYTES = 64 << 20
MOST_IDS = 2**31
"""Ids are stored as int32 at most."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
InsidePath = Annotated[str, AfterValidator(require_inside)]
Count = Annotated[int, Field(ge=0)]

Split = Literal["train", "heldout"]


class ShardEntry(Stored):
    """One .bin/.idx pair: what one input shard gave to one split."""

    prefix: InsidePath
    """Path without `.bin`/`.idx`, relative to the manifest's folder."""
    documents: int = Field(ge=1)
    tokens: int = Field(ge=1)
    """Token ids, the EOS of each document included."""
    text_bytes: Count
    """UTF-8 bytes of the documents' text (of the decoded ids where the input was ids)."""
    bin_sha256: Sha256
    idx_sha256: Sha256


class InputEntry(Stored):
    """One shard as it was read: a file, or several text files."""

    file: InsidePath
    bytes: Count
    sha256: Sha256
    rows: Count
    skipped_null: Count
    skipped_empty: Count
    skipped_not_utf8: Count

    @property
    def skipped(self) -> Counter[str]:
        """Rows that gave no document, by reason."""
        return Counter({"null": self.skipped_null, "empty": self.skipped_empty, "not UTF-8": self.skipped_not_utf8})


class SourceManifest(Stored):
    """One corpus. A shard that gave no document to a split has no entry there."""

    column: str
    holds_ids: bool
    """The column held token ids instead of text."""
    inputs: list[InputEntry]
    train: list[ShardEntry]
    heldout: list[ShardEntry]

    def entries(self, split: Split) -> list[ShardEntry]:
        """Pairs of one split, in the order of the input shards."""
        return self.train if split == "train" else self.heldout

    def tokens(self, split: Split) -> int:
        return sum(entry.tokens for entry in self.entries(split))

    def documents(self, split: Split) -> int:
        return sum(entry.documents for entry in self.entries(split))

    def skipped_rows(self) -> str:
        """How many rows gave no document, and why, in words."""
        skipped = sum((entry.skipped for entry in self.inputs), Counter())
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in skipped.items() if count)
        return f"{skipped.total():,} rows skipped" + (f" ({reasons})" if reasons else "")

    def text_bytes(self, split: Split) -> int:
        return sum(entry.text_bytes for entry in self.entries(split))


class CorpusManifest(Stored):
    """All sources of a corpus and what decided their tokens. It names no absolute path and no time: equal data, equal file."""

    format_version: Literal[1] = FORMAT_VERSION
    tokenizer_fingerprint: str
    vocab_size: int = Field(ge=1, le=MOST_IDS)
    eos_id: Count
    dtype: TokenDtypeName
    """Type of the ids in the .bin files."""
    split_rule: str = SPLIT_RULE
    heldout_fraction: float = Field(ge=0, le=1, allow_inf_nan=False)
    sources: dict[str, SourceManifest] = Field(min_length=1)

    @model_validator(mode="after")
    def _ids_fit(self) -> Self:
        if self.eos_id >= self.vocab_size:
            raise ValueError(f"eos_id is {self.eos_id}, but the vocabulary has {self.vocab_size} ids")
        if self.dtype != token_dtype_name(self.vocab_size):
            raise ValueError(f"dtype is {self.dtype}, but a vocabulary of {self.vocab_size} ids is stored otherwise")
        return self

    @property
    def fingerprint(self) -> str:
        """SHA-256 over what defines the token stream: the tokenizer and the bytes of all pairs in order."""
        pairs = {
            name: {
                split: [(entry.bin_sha256, entry.idx_sha256) for entry in source.entries(split)]
                for split in ("train", "heldout")
            }
            for name, source in self.sources.items()
        }
        return fingerprint({"tokenizer": self.tokenizer_fingerprint, "dtype": self.dtype, "pairs": pairs})

    def of(self, names: Sequence[str]) -> Self:
        """Return the same of some sources alone, for a run that reads no others."""
        return self.model_copy(update={"sources": {name: one for name, one in self.sources.items() if name in names}})

    def source_fingerprint(self, name: str) -> str:
        """Return the SHA-256 over what defines the tokens of one source that are trained on."""
        return fingerprint([(entry.bin_sha256, entry.idx_sha256) for entry in self.sources[name].train])

    def save(self, data_dir: Path) -> None:
        """Write `manifest.json` atomically."""
        write_text_atomic(data_dir / MANIFEST_NAME, self.model_dump_json(indent=2) + "\n")

    def prefixes(self, data_dir: Path, source: str, split: Split) -> list[Path]:
        """Path prefixes of a source's pairs, for `IndexedTokens` or Megatron's `--data-path`."""
        return [data_dir / entry.prefix for entry in self.sources[source].entries(split)]

    def verify(self, data_dir: Path) -> int:
        """Re-check every file by SHA-256; returns their number. Raises UserError that lists those absent or changed."""
        wrong, checked = [], 0
        for source in self.sources.values():
            for entry in (*source.train, *source.heldout):
                prefix = data_dir / entry.prefix
                for path, expected in ((bin_path(prefix), entry.bin_sha256), (idx_path(prefix), entry.idx_sha256)):
                    checked += 1
                    if not path.is_file():
                        wrong.append(f"{path} is absent")
                    elif sha256_file(path) != expected:
                        wrong.append(f"{path} has changed")
        if wrong:
            raise UserError(
                data_dir,
                f"{len(wrong)} of {checked} files are not what the manifest says: {'; '.join(wrong[:10])}",
                "files with the SHA-256 of the manifest",
                "Delete the files named and run the stage `data` again: it makes them anew.",
            )
        return checked


def load_manifest(data_dir: Path) -> CorpusManifest:
    """The manifest of a prepared corpus. Raises UserError if there is none or it cannot be understood."""
    path = data_dir / MANIFEST_NAME
    if not path.exists():
        raise UserError(
            path,
            "does not exist",
            "a prepared corpus",
            "Prepare it first: `python launcher.py stage=data` with the same recipe.",
        )
    text = read_bounded(path, MAX_MANIFEST_BYTES, "the manifest of a prepared corpus")
    try:
        return CorpusManifest.model_validate_json(text)
    except ValidationError as error:
        raise UserError(
            path,
            f"cannot be understood ({first_problem(error)})",
            f"a manifest of format version {FORMAT_VERSION}",
            "Delete it and run the stage `data` again: finished shards are kept.",
        ) from None
