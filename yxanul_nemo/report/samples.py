"""What the model of each phase's end writes: made once from its checkpoint, and kept beside the report."""

from dataclasses import asdict, dataclass
from pathlib import Path

from yxanul_nemo.checkpoint.committed import Checkpoint
from yxanul_nemo.checkpoint.store import CheckpointStore
from yxanul_nemo.config.stages import ReportConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.files import write_json_atomic
from yxanul_nemo.json_files import parse_json
from yxanul_nemo.log import logger, quiet_libraries
from yxanul_nemo.run_folder import RunFolder

SAMPLES_NAME = "samples.json"
TOP_P = 0.95
SEED = 0


@dataclass(frozen=True)
class Sample:
    """One text."""

    phase: int
    """It was written after this phase."""
    prompt: str
    text: str
    """What the model added."""
    tokens: int
    """How many it took."""
    checkpoint_digest: str
    max_tokens: int
    temperature: float

    def is_for(self, checkpoint: Checkpoint, prompt: str, settings: ReportConfig) -> bool:
        """Whether the same checkpoint and settings would write it again."""
        return (self.checkpoint_digest, self.prompt, self.max_tokens, self.temperature) == (
            checkpoint.manifest.digest,
            prompt,
            settings.sample_tokens,
            settings.temperature,
        )


def read_or_make_samples(run_dir: Path, folder: Path, settings: ReportConfig) -> list[Sample]:
    """Samples of all checkpoints at ends of phases, in order; those that `folder` has from before are not made again.

    A checkpoint that cannot be used is named in the log and left out.
    """
    path = folder / SAMPLES_NAME
    kept = _read(path)
    samples: list[Sample] = []
    ends = (
        [c for c in CheckpointStore(RunFolder(run_dir).checkpoints).list() if c.phase_end] if settings.prompts else []
    )
    for checkpoint in ends:
        wanted = [(p, next((s for s in kept if s.is_for(checkpoint, p, settings)), None)) for p in settings.prompts]
        missing = [prompt for prompt, sample in wanted if sample is None]
        made = iter(_make(checkpoint, missing, settings) if missing else [])
        samples += [sample for sample in (old or next(made, None) for _, old in wanted) if sample is not None]
    if samples != kept:
        write_json_atomic(path, [asdict(sample) for sample in samples])
    return samples


def _make(checkpoint: Checkpoint, prompts: list[str], settings: ReportConfig) -> list[Sample]:
    # Heavy, and needed only for what is missing.
    quiet_libraries()
    from yxanul_nemo.export.generate import generate_with
    from yxanul_nemo.export.source import load_source

    quiet_libraries()
    logger.info("samples after phase %d, from %s", checkpoint.phase, checkpoint.path.name)
    samples = []
    try:
        loaded = load_source(checkpoint.path, device=settings.device)
        for prompt in prompts:
            made = generate_with(loaded, prompt, settings.sample_tokens, settings.temperature, TOP_P, SEED)
            samples.append(
                Sample(
                    checkpoint.phase,
                    prompt,
                    made.text,
                    made.tokens,
                    checkpoint.manifest.digest,
                    settings.sample_tokens,
                    settings.temperature,
                )
            )
    except UserError as error:
        logger.warning("no samples after phase %d: %s", checkpoint.phase, error)
    return samples


def _read(path: Path) -> list[Sample]:
    try:
        return [Sample(**entry) for entry in parse_json(path.read_text(encoding="utf-8"))]
    except (FileNotFoundError, ValueError, TypeError):
        return []
