"""The model of a committed checkpoint, for everything but training: validation, export."""

from yxanul_nemo.checkpoint.committed import Checkpoint
from yxanul_nemo.checkpoint.shards import ShardReader
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.config.training import ParallelConfig, PrecisionConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.files import fingerprint
from yxanul_nemo.model.build import build_model
from yxanul_nemo.model.counts import parameter_count
from yxanul_nemo.model.gpt import YxanulGPT
from yxanul_nemo.model.whole_weights import require_finite


def restore_model(
    config: RunConfig, checkpoint: Checkpoint, vocab_size: int, precision: PrecisionConfig, parallel: ParallelConfig
) -> YxanulGPT:
    """The weights of `checkpoint` in a model of the given precision and layout (not necessarily those it was trained in).

    Raises:
        UserError: the checkpoint is of another model, or its weights are not all finite.
    """
    ledger = checkpoint.read_ledger()
    if ledger.model_fingerprint != fingerprint({"model": config.model.model_dump(), "vocab_size": vocab_size}):
        raise UserError(checkpoint.path, "is of another model", f"model={config.model.name} with {vocab_size:,} ids")
    reader = ShardReader(checkpoint.path)
    found, needed = reader.values("model."), parameter_count(config.model, config.model.padded_vocab_size(vocab_size))
    if found < needed:
        # Before a model of that size is built: the numbers in a configuration cost nothing to write.
        raise UserError(
            checkpoint.path, f"holds {found:,} numbers of a model", f"{needed:,}, as its config.yaml describes"
        )
    model = build_model(config.model, vocab_size, precision, parallel, config.run.seed, drawn=False)
    reader.load_into(model.sharded_state_dict(prefix="model."))
    require_finite(dict(model.named_parameters()), checkpoint.path)
    model.eval()
    return model
