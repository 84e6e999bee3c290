"""A run with a committed checkpoint of large random weights, in which every part of the model matters, and its export."""

from collections.abc import Callable
from pathlib import Path

import pytest

from yxanul_nemo.checkpoint.store import Checkpoint
from yxanul_nemo.config.run import RunConfig

MakeRun = Callable[..., tuple[RunConfig, Checkpoint]]


@pytest.fixture(scope="session")
def make_run(
    prepared: Path, make_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory
) -> MakeRun:
    """A new run after its first phase: `make_run(*overrides)` gives its configuration and checkpoint."""

    def make(*overrides: str) -> tuple[RunConfig, Checkpoint]:
        folder = tmp_path_factory.mktemp("run")
        (folder / "tokenizer").symlink_to(prepared / "tokenizer")
        config = make_config(f"run.dir={folder}", f"data.dir={prepared / 'data'}", *overrides)
        return config, commit_random_weights(config)

    return make


@pytest.fixture(scope="session")
def exported(make_run: MakeRun) -> tuple[RunConfig, Checkpoint]:
    """A run that is validated and exported in FP32. Tests must not change it."""
    from yxanul_nemo.export.export import export_checkpoint
    from yxanul_nemo.validation.stage import validate_checkpoint

    config, checkpoint = make_run()
    validate_checkpoint(config)
    export_checkpoint(config)
    return config, checkpoint


def commit_random_weights(config: RunConfig, seed: int = 1) -> Checkpoint:
    """Commit a checkpoint of the end of phase 1 as training does, with large random weights."""
    import torch

    from data_prep.manifest import load_manifest
    from yxanul_nemo.checkpoint.ledger import Ledger
    from yxanul_nemo.checkpoint.shards import save_shards
    from yxanul_nemo.checkpoint.store import CheckpointStore
    from yxanul_nemo.config.load import to_yaml
    from yxanul_nemo.model.build import build_model, reference_precision
    from yxanul_nemo.training.cpu_backend import CpuBackend
    from yxanul_nemo.training.identity import expected_run, phase_plan
    from yxanul_nemo.training.phases import plan_phases

    manifest = load_manifest(config.data_dir)
    model = build_model(config.model, manifest.vocab_size, *reference_precision(), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Far from where training starts: attention is sharp, and a token's own embedding does not decide what follows it.
            drawn = torch.randn(weight.shape, generator=generator)
            if weight.dim() == 1:
                weight.copy_(drawn if "final" in name else 1 + 0.3 * drawn)
            else:
                weight.copy_(drawn * (0.5 if "embedding" in name else 0.2))
    phases = plan_phases(config.curriculum)
    ledger = Ledger.fresh(expected_run(config, manifest, phases)).start_phase(phase_plan(phases[0]), 4, 1)
    per_source = dict.fromkeys(config.data.source_names, 0) | {config.data.source_names[0]: phases[0].tokens}
    ledger = ledger.consume(phases[0].tokens, per_source)
    store = CheckpointStore(config.run.dir / "checkpoints")
    place = store.begin(ledger.tokens_total)
    save_shards(CpuBackend(model, config.optim).sharded_state(), place, rank=0)
    (place / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    return store.commit(place, ledger, phase_end=True)
