"""One commit to the Hugging Face hub with all files of a publication; nothing of it can be seen before that commit.

`HF_TOKEN` or `hf auth login` gives the right to write, `HF_ENDPOINT` names another hub.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from yxanul_nemo.config.stages import PublishConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.export.export import GGUF_NAME, NEMO_NAME
from yxanul_nemo.export.formats import MODELLING_CODE
from yxanul_nemo.publish.card import TAG
from yxanul_nemo.publish.publication import CARD_NAME

KEY = "publish.repo"
ONLY_SOMETIMES = (NEMO_NAME, GGUF_NAME, MODELLING_CODE.name)
"""Files that some exports have and others lack; those of an older export are taken out."""
OF_NO_MODEL = (".gitattributes", CARD_NAME, "LICENSE")
"""Files of a repository that holds no model yet."""
NOTHING_SEEN = "Nothing of it can be seen there. Repeat the command."


def require_name(repo: str | None) -> str:
    """Return the repository's name; UserError if there is none, or none that the hub allows."""
    if repo is None:
        raise UserError(KEY, "is not set", "OWNER/NAME on the Hugging Face hub", "As in publish.repo=me/my-model.")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(KEY, f"is '{repo}'", "OWNER/NAME as the hub allows it", str(error)) from None
    return repo


def push(settings: PublishConfig, card: ModelCard, files: Mapping[str, Path], message: str) -> str:
    """Publish `files` (path in the repository -> file here) and the card; returns the address of the commit.

    Raises:
        UserError: no token or one without the right, a repository that holds something else, a card that the hub does not take,
            or no network.
    """
    repo = require_name(settings.repo)
    if not sys.stderr.isatty():
        disable_progress_bars()
    with _refusals(repo):
        if get_token() is None:
            raise UserError(
                KEY,
                f"is {repo}, and there is no token",
                "a token that may write",
                "Set HF_TOKEN or run `hf auth login`.",
            )
        try:
            card.validate()
        except ValueError as error:
            raise UserError(
                "the model card",
                f"is not taken by the hub ({error})",
                "metadata that it allows",
                "Often export.license.",
            ) from None
        api = HfApi()
        _require_own_model(api, repo)
        api.create_repo(repo, private=settings.private, exist_ok=True)
        if settings.revision != "main":
            api.create_branch(repo, branch=settings.revision, exist_ok=True)
        there = {file.rfilename for file in api.model_info(repo, revision=settings.revision).siblings or []}
        content: dict[str, Path | bytes] = {**files, CARD_NAME: str(card).encode()}
        additions = [CommitOperationAdd(name, source) for name, source in content.items()]
        gone = [CommitOperationDelete(name) for name in ONLY_SOMETIMES if name in there and name not in files]
        done = api.create_commit(
            repo, [*additions, *gone], commit_message=message, revision=settings.revision, repo_type="model"
        )
    return done.commit_url


def _require_own_model(api: HfApi, repo: str) -> None:
    """Refuse a repository that holds what this project did not publish."""
    try:
        found = api.model_info(repo, revision="main")
    except RepositoryNotFoundError:
        # It is made.
        return
    others = [file.rfilename for file in found.siblings or [] if file.rfilename not in OF_NO_MODEL]
    tags = (found.card_data.get("tags") if found.card_data else None) or []
    if others and TAG not in tags:
        raise UserError(
            KEY,
            f"is {repo}, which holds something else ({', '.join(sorted(others)[:3])})",
            f"a new name, or a model that stage=publish made (its card has the tag {TAG})",
        )


@contextmanager
def _refusals(repo: str) -> Iterator[None]:
    """Turn what the hub refuses, and a missing network, into a UserError."""
    page = f"{constants.ENDPOINT}/{repo}"
    try:
        yield
    except UserError:
        raise
    except (httpx2.TransportError, HfHubHTTPError, OfflineModeIsEnabled, RuntimeError, ValueError) as error:
        # The client wraps what went wrong with one of several large files.
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        words = str(cause).strip().partition("\n")[0] or type(cause).__name__
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
        if status in (401, 403, 404):
            raise UserError(
                KEY,
                f"is {repo}: the hub gives this token no right to write there ({words})",
                f"a token of {repo.partition('/')[0]} that may write",
                "Set HF_TOKEN or run `hf auth login`; https://huggingface.co/settings/tokens lists yours.",
            ) from None
        if isinstance(cause, httpx2.TransportError | OfflineModeIsEnabled):
            raise UserError(page, f"does not answer ({words})", "network access to the hub", NOTHING_SEEN) from None
        raise UserError(page, f"refuses ({words})", "", NOTHING_SEEN) from None
