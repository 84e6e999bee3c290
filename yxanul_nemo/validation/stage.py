"""`stage=validate`: the newest good checkpoint of a run on all domains; and the run's model while it is trained."""

import time
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor

from data_prep.corpus.manifest import CorpusManifest, load_manifest
from data_prep.tokenizers.tokenizer import Tokenizer
from yxanul_nemo.checkpoint.committed import Checkpoint
from yxanul_nemo.checkpoint.restore import restore_model
from yxanul_nemo.checkpoint.store import CheckpointStore
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.config.training import SHORTEST_CONTEXT_CHUNK
from yxanul_nemo.curriculum.phases import plan_phases
from yxanul_nemo.files import write_json_atomic
from yxanul_nemo.log import logger
from yxanul_nemo.machine.agreement import from_first_rank
from yxanul_nemo.machine.runtime import init_process_groups, outside_training, resolve_device
from yxanul_nemo.model.context import WindowSlices
from yxanul_nemo.validation.domains import load_domains
from yxanul_nemo.validation.record import metric_of, settings_fingerprint
from yxanul_nemo.validation.scoring import IGNORE_INDEX, Document
from yxanul_nemo.validation.validate import Domains, score_domains, summarize, validate


def validate_checkpoint(config: RunConfig) -> None:
    """Score the newest good checkpoint and keep the result in `validation/<checkpoint>.json`."""
    manifest = load_manifest(config.data_dir)
    device = resolve_device(config.parallel)
    init_process_groups(config.parallel, device, config.run.seed)
    store = CheckpointStore.of_run(config)
    checkpoint = from_first_rank(lambda: store.choose("latest"))
    precision = outside_training(config.precision, config.parallel, device)
    model = restore_model(config, checkpoint, manifest.vocab_size, precision, config.parallel)
    phases = plan_phases(config.curriculum)
    seq_len = phases[checkpoint.phase - 1].seq_len if 1 <= checkpoint.phase <= len(phases) else None
    scores = validate_model(config, manifest, model, seq_len, device)
    if torch.distributed.get_rank() == 0:
        result = identified(scores, config, checkpoint)
        metric = config.validation.best_metric
        store.mark_best(checkpoint, metric, metric_of(result, metric))
        write_json_atomic(config.run.folder.checkpoint_result(checkpoint.path.name), result)


def identified(scores: dict[str, Any], config: RunConfig, checkpoint: Checkpoint) -> dict[str, Any]:
    """The scores of a checkpoint's weights as they are kept, with what they are of."""
    return {
        "checkpoint": checkpoint.path.name,
        "checkpoint_digest": checkpoint.manifest.digest,
        "settings_fingerprint": settings_fingerprint(config),
        "tokens_total": checkpoint.tokens,
        "phase": checkpoint.phase,
        **scores,
    }


def validate_model(
    config: RunConfig, manifest: CorpusManifest, model: torch.nn.Module, seq_len: int | None, device: str
) -> dict[str, Any]:
    """Validate `model`, trained at `seq_len` (None: unknown); every data-parallel rank takes part and gets the scores."""
    model.eval()
    began = time.perf_counter()
    domains = run_domains(config, manifest)
    read = time.perf_counter()
    result = validate_at_lengths(config, manifest.eos_id, model, domains, seq_len, device)
    tokens = sum(score["tokens"] for score in result["domains"].values())
    logger.info(
        "%s tokens scored in %.1f s, after %.1f s for reading them",
        f"{tokens:,}",
        time.perf_counter() - read,
        read - began,
    )
    return result


def run_domains(config: RunConfig, manifest: CorpusManifest) -> dict[str, list[Document]]:
    """The configured domains in the run's tokens; UserError if its tokenizer is not that of its data."""

    @cache
    def tokenizer() -> Tokenizer:
        return Tokenizer.load_known(config.run.folder.tokenizer, manifest.tokenizer_fingerprint)

    return load_domains(config, manifest, tokenizer)


def validate_at_lengths(
    config: RunConfig, eos_id: int, model: torch.nn.Module, domains: Domains, seq_len: int | None, device: str
) -> dict[str, Any]:
    """`validate` at the fixed length and, as `at_phase_len`, in windows without overlap of the phase's `seq_len` (None: unknown)."""
    group, settings = parallel_state.get_data_parallel_group(), config.validation
    loss = partial(whole_window_loss, model, parallel_state.get_context_parallel_group())
    result = validate(loss, domains, settings, eos_id=eos_id, device=device, group=group)
    if settings.at_phase_len and seq_len not in (None, settings.eval_len):
        nats = score_domains(loss, domains, seq_len, seq_len, settings.batch_tokens, eos_id, device, group)
        result["at_phase_len"] = summarize(domains, nats, seq_len, seq_len)
    return result


def whole_window_loss(model: torch.nn.Module, group: dist.ProcessGroup, ids_BT: Tensor, labels_BT: Tensor) -> Tensor:
    """Loss of each token [B, T], on every rank of `group`, which shares the model's windows; T may be any length.

    Windows are padded to chunks that attention takes; padding comes last, so nothing scored sees it.
    """
    if group.size() == 1:
        return model(ids_BT, labels_BT)
    slices, length = WindowSlices(group), ids_BT.size(1)
    padding = -length % (2 * group.size() * SHORTEST_CONTEXT_CHUNK)
    ids_BT, labels_BT = F.pad(ids_BT, (0, padding)), F.pad(labels_BT, (0, padding), value=IGNORE_INDEX)
    return slices.join(model(slices.take(ids_BT), slices.take(labels_BT)))[:, :length]
