"""The model of a phase on this machine: its backend, its number format, and the micro-batch that fits."""

from dataclasses import dataclass

from megatron.core import parallel_state

from data_prep.corpus.manifest import CorpusManifest
from yxanul_nemo.checkpoint.ledger import PhaseRecord
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.config.training import NumberFormat
from yxanul_nemo.curriculum.phases import Phase, batch_layout
from yxanul_nemo.data.windows import BatchLayout
from yxanul_nemo.machine.agreement import any_rank, largest_of_ranks
from yxanul_nemo.model.build import build_model
from yxanul_nemo.model.documents import Documents
from yxanul_nemo.model.gpt import YxanulGPT
from yxanul_nemo.training.backend import Backend, forget_backends
from yxanul_nemo.training.cpu_backend import CpuBackend
from yxanul_nemo.training.cuda_backend import CudaBackend
from yxanul_nemo.training.micro_batch import fit_batch
from yxanul_nemo.training.precision_choice import formats_for, pick_faster_format


@dataclass(frozen=True)
class BuiltPhase:
    """A backend that is ready to load a checkpoint or to train."""

    config: RunConfig
    """The configuration with the number format that was chosen."""
    backend: Backend
    layout: BatchLayout


def build_phase(
    config: RunConfig,
    manifest: CorpusManifest,
    phase: Phase,
    device: str,
    record: PhaseRecord | None,
    max_micro_batch_tokens: int,
) -> BuiltPhase:
    """Build the model and optimizer of a phase.

    Args:
        config: `parallel.micro_batch_tokens` is a number.
        device: `cpu` or `cuda`. Only a GPU has number formats to choose from, by its speed, and memory to try.
        record: the ledger's record of this phase if it was begun; its number format is kept where the machine has it.
        max_micro_batch_tokens: largest micro-batch of a rank.

    Raises:
        UserError: the machine cannot run the recipe, or a step cannot be split over its ranks.
    """
    data_parallel = parallel_state.get_data_parallel_world_size()
    if device == "cpu":
        (only_format,) = formats_for(config, phase, record, data_parallel, device)
        config = _in_format(config, only_format)
        model = _model(config, manifest, phase)
        size, accumulation = batch_layout(phase, data_parallel, max_micro_batch_tokens, config.precision.token_multiple)
        backend = make_backend(model, config, device, manifest.eos_id)
        return BuiltPhase(config, backend, BatchLayout(size, accumulation, data_parallel))
    # A phase before it in this process may have left its memory behind.
    forget_backends(device)
    formats = formats_for(config, phase, record, data_parallel, device)
    config = _in_format(config, formats[0])
    backend, layout = _fit_on_gpu(config, manifest, phase, data_parallel, max_micro_batch_tokens)
    if len(formats) > 1:
        micro_batch_tokens = layout.micro_batch_size * phase.seq_len
        chosen = pick_faster_format(
            formats, micro_batch_tokens, backend.seconds_per_micro_batch, largest_of_ranks, phase.number
        )
        if chosen != formats[0]:
            del backend
            forget_backends(device)
            config = _in_format(config, chosen)
            backend, layout = _fit_on_gpu(config, manifest, phase, data_parallel, max_micro_batch_tokens)
    return BuiltPhase(config, backend, layout)


def make_backend(model: YxanulGPT, config: RunConfig, device: str, eos_id: int | None = None) -> Backend:
    """Return the backend for `device` (`cpu` or `cuda`).

    Args:
        eos_id: token between documents, which `data.document_mask` needs.
    """
    assert eos_id is not None or not config.data.document_mask
    documents = Documents(eos_id) if eos_id is not None and config.data.document_mask else None
    if device == "cuda":
        return CudaBackend(model, config, documents)
    return CpuBackend(model, config.optim, config.parallel, config.guards, documents)


def _fit_on_gpu(
    config: RunConfig, manifest: CorpusManifest, phase: Phase, data_parallel: int, max_micro_batch_tokens: int
) -> tuple[CudaBackend, BatchLayout]:
    backend = make_backend(_model(config, manifest, phase), config, "cuda", manifest.eos_id)
    assert isinstance(backend, CudaBackend)
    layout = fit_batch(
        phase,
        data_parallel,
        max_micro_batch_tokens,
        config.precision.token_multiple,
        backend.prepare,
        any_rank,
    )
    return backend, layout


def _model(config: RunConfig, manifest: CorpusManifest, phase: Phase) -> YxanulGPT:
    return build_model(
        config.model,
        manifest.vocab_size,
        config.precision,
        config.parallel,
        config.run.seed,
        seq_len=phase.seq_len,
    )


def _in_format(config: RunConfig, number_format: NumberFormat) -> RunConfig:
    return config.model_copy(update={"precision": config.precision.named(number_format)})
