"""What a run is, for the ledger: fingerprints of what must not change between a checkpoint and the run that resumes it."""

from data_prep.corpus.manifest import CorpusManifest
from yxanul_nemo.checkpoint.ledger import Expected, PhasePlan
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.curriculum.phases import Phase
from yxanul_nemo.files import fingerprint


def expected_run(config: RunConfig, manifest: CorpusManifest, phases: list[Phase]) -> Expected:
    """The configured run as a ledger sees it. Logging, paths, batch layout and precision of the same kind may change freely."""
    decisive = {
        # Without what is null, so that checkpoints from before such a key are of the same run.
        "optim": config.optim.model_dump(exclude_none=True),
        "precision": config.precision.model_dump(),
        "data_seed": config.data.seed,
        "curriculum_tokens": phases[-1].first_token + phases[-1].tokens,
    }
    if config.guards.spike_sigma is not None:
        decisive["spikes"] = [config.guards.spike_sigma, config.guards.spike_window_steps]
    return Expected(
        corpus_fingerprint=manifest.fingerprint,
        tokenizer_fingerprint=manifest.tokenizer_fingerprint,
        model_fingerprint=fingerprint({"model": config.model.model_dump(), "vocab_size": manifest.vocab_size}),
        config_fingerprint=fingerprint(decisive),
        document_mask=config.data.document_mask,
        window_order=config.data.window_order,
        optimizer=config.optim.name,
        phases=tuple(phase_plan(phase) for phase in phases),
    )


def phase_plan(phase: Phase) -> PhasePlan:
    """A phase as the ledger records it."""
    return PhasePlan(
        seq_len=phase.seq_len,
        tokens_per_step=phase.tokens_per_step,
        planned_tokens=phase.tokens,
        lr_scale=phase.lr_scale,
        grad_clip=phase.grad_clip,
        blend=dict(phase.blend) if phase.blend else None,
    )
