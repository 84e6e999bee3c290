"""`stage=validate`: the newest good checkpoint of a run on all domains."""

import torch
from megatron.core import parallel_state

from data_prep.manifest import CorpusManifest, load_manifest
from data_prep.tokenizer import Tokenizer
from yxanul_nemo.checkpoint.store import Checkpoint, CheckpointStore
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.files import write_json_atomic
from yxanul_nemo.runtime import resolve_device
from yxanul_nemo.training.restore import restore_model
from yxanul_nemo.validation.domains import load_domains
from yxanul_nemo.validation.record import checkpoint_result_path, settings_fingerprint
from yxanul_nemo.validation.validate import validate


def validate_checkpoint(config: RunConfig) -> None:
    """Score the newest good checkpoint and keep the result in `validation/<checkpoint>.json`."""
    manifest = load_manifest(config.data_dir)
    checkpoint = CheckpointStore(config.run.dir / "checkpoints", verify=config.checkpoint.verify).newest_good()
    if checkpoint is None:
        raise UserError(
            config.run.dir / "checkpoints", "holds no checkpoint", fix="Run `python launcher.py stage=train` first."
        )
    device = resolve_device(config.parallel)
    model = restore_model(config, checkpoint, manifest.vocab_size, config.precision, config.parallel)
    result = validate_model(config, manifest, model, checkpoint, device)
    if torch.distributed.get_rank() == 0:
        write_json_atomic(checkpoint_result_path(config.run.dir, checkpoint), result)


def validate_model(
    config: RunConfig, manifest: CorpusManifest, model: torch.nn.Module, checkpoint: Checkpoint, device: str
) -> dict:
    """Validate `model`, which holds the weights of `checkpoint`; every data-parallel rank takes part and gets the result."""
    tokenizer = Tokenizer.load(config.run.dir / "tokenizer")
    if tokenizer.fingerprint != manifest.tokenizer_fingerprint:
        raise UserError(config.run.dir / "tokenizer", "is not the tokenizer of the data", fix="Run stage=data again.")
    model.eval()
    result = validate(
        model,
        load_domains(config, manifest, tokenizer),
        config.validation,
        eos_id=manifest.eos_id,
        device=device,
        group=parallel_state.get_data_parallel_group(),
    )
    return {
        "checkpoint": checkpoint.path.name,
        "checkpoint_digest": checkpoint.manifest.digest,
        "settings_fingerprint": settings_fingerprint(config),
        "tokens_total": checkpoint.tokens,
        "phase": checkpoint.phase,
        **result,
    }
