"""The model of a committed checkpoint, for everything but training: validation, export."""

from yxanul_nemo.checkpoint.shards import ShardReader
from yxanul_nemo.checkpoint.store import Checkpoint
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.config.training import ParallelConfig, PrecisionConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.files import fingerprint
from yxanul_nemo.model.build import build_model
from yxanul_nemo.model.gpt import YxanulGPT


def restore_model(
    config: RunConfig, checkpoint: Checkpoint, vocab_size: int, precision: PrecisionConfig, parallel: ParallelConfig
) -> YxanulGPT:
    """The weights of `checkpoint` in a model of the given precision and layout (not necessarily those it was trained in).

    Raises:
        UserError: the checkpoint is of another model.
    """
    ledger = checkpoint.read_ledger()
    if ledger.model_fingerprint != fingerprint({"model": config.model.model_dump(), "vocab_size": vocab_size}):
        raise UserError(checkpoint.path, "is of another model", f"model={config.model.name} with {vocab_size:,} ids")
    model = build_model(config.model, vocab_size, precision, parallel, config.run.seed, drawn=False)
    ShardReader(checkpoint.path).load_into(model.sharded_state_dict(prefix="model."))
    model.eval()
    return model
