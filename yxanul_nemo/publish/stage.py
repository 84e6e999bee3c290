"""`stage=publish`: the export of a run, with its model card, to the Hugging Face hub."""

from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.figures import size
from yxanul_nemo.log import logger
from yxanul_nemo.publish.card import publication_card
from yxanul_nemo.publish.publication import CARD_NAME, read_publication
from yxanul_nemo.publish.push import push, require_name


def run_publish_stage(config: RunConfig) -> None:
    """Publish the export in `run.dir` as `publish.repo`, or show with `publish.dry_run` what would be published.

    Raises:
        UserError: no name, no export, a changed file, no token, or what the hub refuses.
    """
    settings = config.publish
    repo = require_name(settings.repo)
    publication = read_publication(config.run.dir)
    card = publication_card(publication, repo)
    if settings.dry_run:
        print(card)
        print(f"{'file':<40}{'size':>12}  SHA-256")
        for name, path in publication.files.items():
            print(f"{name:<40}{size(path.stat().st_size):>12}  {publication.hashes[name]}")
        print(
            f"\n{len(publication.files)} files and {CARD_NAME} for {repo} on {settings.revision}; nothing was published"
        )
        return
    message = f"{publication.run.config.run.name} after {publication.ledger.tokens_total:,} tokens"
    address = push(settings, card, publication.files, message)
    logger.info("published: %s (%d files and %s)", address, len(publication.files), CARD_NAME)
