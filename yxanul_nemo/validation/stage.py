"""`stage=validate`: the newest good checkpoint of a run on all domains."""

import torch
from megatron.core import parallel_state

from data_prep.manifest import CorpusManifest, load_manifest
from data_prep.tokenizer import Tokenizer
from yxanul_nemo.checkpoint.store import Checkpoint, CheckpointStore
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.files import write_json_atomic
from yxanul_nemo.runtime import init_process_groups, resolve_device
from yxanul_nemo.training.agreement import from_first_rank
from yxanul_nemo.training.restore import restore_model
from yxanul_nemo.validation.domains import load_domains
from yxanul_nemo.validation.record import checkpoint_result_path, settings_fingerprint
from yxanul_nemo.validation.validate import validate


def validate_checkpoint(config: RunConfig) -> None:
    """Score the newest good checkpoint and keep the result in `validation/<checkpoint>.json`."""
    manifest = load_manifest(config.data_dir)
    device = resolve_device(config.parallel)
    init_process_groups(config.parallel, device, config.run.seed)
    store = CheckpointStore(config.run.dir / "checkpoints", verify=config.checkpoint.verify)
    checkpoint = from_first_rank(store.newest_good)
    if checkpoint is None:
        raise UserError(
            config.run.dir / "checkpoints", "holds no checkpoint", fix="Run `python launcher.py stage=train` first."
        )
    model = restore_model(config, checkpoint, manifest.vocab_size, config.precision, config.parallel)
    scores = validate_model(config, manifest, model, device)
    if torch.distributed.get_rank() == 0:
        result = identified(scores, config, checkpoint)
        write_json_atomic(checkpoint_result_path(config.run.dir, checkpoint), result)


def identified(scores: dict, config: RunConfig, checkpoint: Checkpoint) -> dict:
    """The scores of a checkpoint's weights as they are kept, with what they are of."""
    return {
        "checkpoint": checkpoint.path.name,
        "checkpoint_digest": checkpoint.manifest.digest,
        "settings_fingerprint": settings_fingerprint(config),
        "tokens_total": checkpoint.tokens,
        "phase": checkpoint.phase,
        **scores,
    }


def validate_model(config: RunConfig, manifest: CorpusManifest, model: torch.nn.Module, device: str) -> dict:
    """Validate `model`; every data-parallel rank takes part and gets the scores."""
    tokenizer = Tokenizer.load(config.run.dir / "tokenizer")
    if tokenizer.fingerprint != manifest.tokenizer_fingerprint:
        raise UserError(config.run.dir / "tokenizer", "is not the tokenizer of the data", fix="Run stage=data again.")
    model.eval()
    return validate(
        model,
        load_domains(config, manifest, tokenizer),
        config.validation,
        eos_id=manifest.eos_id,
        device=device,
        group=parallel_state.get_data_parallel_group(),
    )
