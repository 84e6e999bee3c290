"""The whole configuration of a run: the sections of `conf/` and the rules between them."""

from pathlib import Path

from pydantic import Field, model_validator

from yxanul_nemo.config.base import Section
from yxanul_nemo.config.curriculum import CurriculumConfig
from yxanul_nemo.config.data import DataConfig, TokenizerConfig
from yxanul_nemo.config.model import ModelConfig
from yxanul_nemo.config.outputs import CheckpointConfig, ExportConfig, LoggingConfig, ValidationConfig
from yxanul_nemo.config.training import OptimConfig, ParallelConfig, PrecisionConfig


class RunSection(Section):
    """Identity of a run."""

    name: str
    """The recipe's name."""
    dir: Path
    """Folder that holds everything of the run."""
    seed: int = 1234
    """Seed of the weights."""
    description: str = ""
    """What this recipe is for."""


class RunConfig(Section):
    """Everything that decides a run."""

    run: RunSection
    model: ModelConfig
    tokenizer: TokenizerConfig
    data: DataConfig
    curriculum: CurriculumConfig
    optim: OptimConfig
    precision: PrecisionConfig
    parallel: ParallelConfig
    checkpoint: CheckpointConfig
    validation: ValidationConfig
    logging: LoggingConfig
    export: ExportConfig
    stage: str | list[str] = "all"
    """Steps of the pipeline to run: all, or one or several of data, train, validate, export."""
    phases: str | int | None = Field(default=None)
    """Phases that `stage=train` runs, counted from 1: `3`, `3-5`; unset: all."""

    @property
    def data_dir(self) -> Path:
        """Folder with the prepared tokens."""
        return self.data.dir or self.run.dir / "data"

    @model_validator(mode="after")
    def _sections_agree(self) -> "RunConfig":
        limit = self.model.max_position_embeddings
        for number, phase in enumerate(self.curriculum.phases, start=1):
            if phase.seq_len > limit:
                raise ValueError(
                    f"curriculum phase {number}: seq_len={phase.seq_len} is over model.max_position_embeddings={limit}"
                )
            if phase.seq_len > self.parallel.micro_batch_tokens:
                raise ValueError(
                    f"curriculum phase {number}: seq_len={phase.seq_len} is over parallel.micro_batch_tokens="
                    f"{self.parallel.micro_batch_tokens}; a micro-batch must hold at least one window"
                )
            for name in phase.blend or self.curriculum.blend or {}:
                if name not in self.data.source_names:
                    raise ValueError(
                        f"curriculum phase {number}: blend names source '{name}', data.sources has {', '.join(self.data.source_names)}"
                    )
        if self.validation.eval_len > limit:
            raise ValueError(
                f"validation.eval_len={self.validation.eval_len} is over model.max_position_embeddings={limit}"
            )
        for name, domain in self.validation.domains.items():
            if domain.source is not None and domain.source not in self.data.source_names:
                raise ValueError(
                    f"validation.domains.{name}.source={domain.source} is not in data.sources ({', '.join(self.data.source_names)})"
                )
        if self.parallel.tensor_parallel > self.model.kv_groups:
            raise ValueError(
                f"parallel.tensor_parallel={self.parallel.tensor_parallel} is over model.kv_groups={self.model.kv_groups}; "
                "a key/value head cannot be split"
            )
        if self.model.kv_groups % self.parallel.tensor_parallel:
            raise ValueError(
                f"model.kv_groups={self.model.kv_groups} is not a multiple of parallel.tensor_parallel={self.parallel.tensor_parallel}"
            )
        return self
