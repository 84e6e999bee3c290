"""Files of validation domains, found and read row by row. Light, so that the launcher can look before anything is trained."""

import codecs
import itertools
from collections.abc import Iterator
from pathlib import Path
from string import Formatter
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.corpus.manifest import CorpusManifest
from yxanul_nemo.config.outputs import DomainConfig, ValidationConfig
from yxanul_nemo.errors import UserError, nearest
from yxanul_nemo.json_files import parse_json

WHERE_TO_GET = "C4's validation split is allenai/c4 on the Hugging Face hub, GSM8K is openai/gsm8k, HumanEval is openai/openai_humaneval."
HOW_TO_FETCH = "Get it with stage=fetch where there is network, or set validation.dir to the folder that has it."


def check_domain_files(config: ValidationConfig, are_to_come: bool = False) -> None:
    """Read the first document of every domain that is a file.

    Args:
        are_to_come: whether files that `stage=fetch` gets may be absent.

    Raises:
        UserError: a file is absent, unreadable or empty, or its rows do not fit the template.
    """
    for name, domain in config.domains.items():
        if are_to_come and domain.hub is not None and not (config.dir / str(domain.path)).is_file():
            continue
        if domain.path is not None:
            check_domain_file(config, name, domain)


def check_domain_file(config: ValidationConfig, name: str, domain: DomainConfig) -> None:
    """Read the first document of a domain that is a file; raises as `check_domain_files`."""
    if next(texts(config, name, domain), None) is None:
        raise empty_domain(name)


def check_heldout(config: ValidationConfig, manifest: CorpusManifest) -> None:
    """See that every domain that is a data source has held-out documents; raises UserError."""
    for name, domain in config.domains.items():
        if domain.source is not None and not manifest.sources[domain.source].documents("heldout"):
            raise empty_domain(name)


def empty_domain(name: str) -> UserError:
    """The error of a domain without documents."""
    return UserError(
        f"validation.domains.{name}",
        "has no documents",
        "at least one",
        "Give a file with some, or raise data.heldout_fraction and prepare the data anew in another run.dir.",
    )


def texts(config: ValidationConfig, name: str, domain: DomainConfig) -> Iterator[str]:
    """The documents of a domain that is a file, at most `max_documents` of them.

    Raises:
        UserError: as `check_domain_files`, for the row at hand.
    """
    where = f"validation.domains.{name}"
    for number, row in enumerate(rows(config, where, domain), start=1):
        try:
            yield domain.template.format(**row)
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{where}.template", f"does not fit row {number} of {domain.path} ({error})", "a format for its values"
            ) from None


def file_of(config: ValidationConfig, where: str, domain: DomainConfig) -> Path:
    """The file of such a domain; UserError, which names the key `where`, if it is absent."""
    assert domain.path is not None, "a domain without a source"
    path = config.dir / domain.path
    if not path.is_file():
        raise UserError(
            where,
            f"{path} does not exist",
            "a parquet or jsonl file",
            HOW_TO_FETCH if domain.hub else f"Set validation.dir to the folder that has it. {WHERE_TO_GET}",
        )
    return path


def rows(config: ValidationConfig, where: str, domain: DomainConfig) -> Iterator[dict[str, Any]]:
    """The rows of such a file with at least the columns of the template, at most `max_documents` of them.

    Args:
        where: the key that describes the file, for messages.

    Raises:
        UserError: as `check_domain_files`.
    """
    path = file_of(config, f"{where}.path" if where.startswith("validation.") else where, domain)
    try:
        columns = [field for _, field, _, _ in Formatter().parse(domain.template) if field is not None]
    except ValueError as error:
        raise UserError(
            f"{where}.template", f"{domain.template!r}: {error}", "a Python format string such as '{text}'"
        ) from None
    yield from itertools.islice(_rows(path, columns, f"{where}.template"), domain.max_documents)


def _rows(path: Path, columns: list[str], where: str) -> Iterator[dict[str, Any]]:
    try:
        if path.suffix == ".parquet":
            file = pq.ParquetFile(path)
            for column in columns:
                if column not in file.schema_arrow.names:
                    raise UserError(
                        where, f"names column '{column}' of {path}", fix=nearest(column, file.schema_arrow.names)
                    )
            for batch in file.iter_batches(columns=columns, batch_size=1024):
                yield from batch.to_pylist()
        else:
            yield from _json_rows(path, columns, where)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            path, f"cannot be read ({str(error).splitlines()[0]})", "parquet, or one JSON object per line"
        ) from None


def _json_rows(path: Path, columns: list[str], where: str) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines; a byte-order mark and blank lines mean nothing."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not line.strip():
                continue
            try:
                row = parse_json(line.decode())
            except (ValueError, RecursionError) as error:
                reason = "is not UTF-8" if isinstance(error, UnicodeDecodeError) else f"is no JSON ({error})"
                raise UserError(path, f"line {number} {reason}", "one JSON object per line, in UTF-8") from None
            if not isinstance(row, dict):
                raise UserError(path, f"line {number} is no JSON object", "one JSON object per line")
            for column in columns:
                if column not in row:
                    fix = nearest(column, row)
                    raise UserError(where, f"names key '{column}', absent in line {number} of {path}", fix=fix)
            yield row
