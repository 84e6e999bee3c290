"""What a run is, for the ledger: its settings, and fingerprints of what a checkpoint and the run that resumes it must share."""

from collections.abc import Sequence
from typing import Any

from data_prep.corpus.manifest import CorpusManifest
from yxanul_nemo.checkpoint.ledger import Expected, PhasePlan
from yxanul_nemo.config.changes import decisive_settings
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.curriculum.phases import Phase
from yxanul_nemo.files import fingerprint


def expected_run(config: RunConfig, manifest: CorpusManifest | None, phases: list[Phase]) -> Expected:
    """Return the configured run as a ledger sees it; without a manifest, as far as settings tell it."""
    decisive = {
        # Without what is null, so that checkpoints from before such a key are of the same run.
        "optim": config.optim.model_dump(exclude_none=True),
        "precision": config.precision.model_dump(),
        "data_seed": config.data.seed,
        "curriculum_tokens": phases[-1].first_token + phases[-1].tokens,
    }
    if config.guards.spike_sigma is not None:
        decisive["spikes"] = [config.guards.spike_sigma, config.guards.spike_window_steps]
    corpus = manifest.of(config.data.source_names) if manifest else None
    vocab_size = manifest.vocab_size if manifest else 0
    return Expected(
        corpus_fingerprint=corpus.fingerprint if corpus else "",
        tokenizer_fingerprint=corpus.tokenizer_fingerprint if corpus else "",
        model_fingerprint=fingerprint({"model": config.model.model_dump(), "vocab_size": vocab_size}),
        config_fingerprint=fingerprint(decisive),
        document_mask=config.data.document_mask,
        window_order=config.data.window_order,
        optimizer=config.optim.name,
        phases=tuple(phase_plan(phase) for phase in phases),
        settings=settings_of(config, phases),
        sources={name: corpus.source_fingerprint(name) for name in corpus.sources} if corpus else {},
    )


def settings_of(config: RunConfig, phases: Sequence[Phase]) -> dict[str, Any]:
    """Return key -> value of everything that decides training; the phases as they are trained, scaled and in whole steps."""
    found = decisive_settings(config)
    for phase in phases:
        plan = phase_plan(phase).model_dump(mode="json")
        plan["tokens"] = plan.pop("planned_tokens")
        found |= {f"curriculum.phases.{phase.number - 1}.{name}": value for name, value in plan.items()}
    return found


def phase_plan(phase: Phase) -> PhasePlan:
    """Return a phase as the ledger records it."""
    return PhasePlan(
        seq_len=phase.seq_len,
        tokens_per_step=phase.tokens_per_step,
        planned_tokens=phase.tokens,
        lr_scale=phase.lr_scale,
        grad_clip=phase.grad_clip,
        blend=dict(phase.blend) if phase.blend else None,
    )
