"""The whole configuration of a run: the sections of `conf/` and the rules between them."""

from collections.abc import Mapping
from pathlib import Path

from pydantic import Field, model_validator

from yxanul_nemo.config.base import PathText, PathValue, Section
from yxanul_nemo.config.budget import BudgetConfig
from yxanul_nemo.config.cluster import ClusterConfig
from yxanul_nemo.config.curriculum import CurriculumConfig, PhaseConfig
from yxanul_nemo.config.data import DataConfig, SourceConfig, TokenizerConfig
from yxanul_nemo.config.model import ModelConfig
from yxanul_nemo.config.outputs import CheckpointConfig, ExportConfig, LoggingConfig, NotifyConfig, ValidationConfig
from yxanul_nemo.config.stages import (
    BenchConfig,
    EvaluateConfig,
    GenerateConfig,
    PlanConfig,
    PublishConfig,
    ReportConfig,
    SweepConfig,
)
from yxanul_nemo.config.training import GuardsConfig, OptimConfig, ParallelConfig, PrecisionConfig
from yxanul_nemo.run_folder import RunFolder


class RunSection(Section):
    """Identity of a run."""

    name: str
    """The recipe's name."""
    dir: PathValue
    """Folder that holds everything of the run."""
    seed: int = 1234
    """Seed of the weights."""
    description: str = ""
    """What this recipe is for."""

    @property
    def folder(self) -> RunFolder:
        """Paths of what is in `dir`."""
        return RunFolder(self.dir)


class RunConfig(Section):
    """Everything that decides a run."""

    run: RunSection
    model: ModelConfig
    tokenizer: TokenizerConfig
    data: DataConfig
    curriculum: CurriculumConfig
    optim: OptimConfig
    precision: PrecisionConfig
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guards: GuardsConfig = GuardsConfig()
    validation: ValidationConfig
    logging: LoggingConfig = LoggingConfig()
    notify: NotifyConfig = NotifyConfig()
    export: ExportConfig = ExportConfig()
    budget: BudgetConfig = BudgetConfig()
    plan: PlanConfig = PlanConfig()
    bench: BenchConfig = BenchConfig()
    report: ReportConfig = ReportConfig()
    sweep: SweepConfig = SweepConfig()
    cluster: ClusterConfig = ClusterConfig()
    generate: GenerateConfig = GenerateConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    publish: PublishConfig = PublishConfig()
    stage: str | list[str] = "all"
    """Steps of the pipeline to run: all, or one or several of fetch, data, train, validate, export; or another stage alone."""
    from_: PathText | list[PathText] | None = Field(default=None, alias="from")
    """Model for stage=generate, evaluate, import and validate: a run's or checkpoint's folder, a .nemo file or a Hugging Face folder;
    validate compares two. Unset: the run's own."""
    prompt: str = ""
    """Beginning of the text that stage=generate writes."""
    phases: str | int | None = Field(default=None)
    """Phases that `stage=train` runs, counted from 1: `3`, `3-5`; unset: all."""
    callbacks: list[str] = Field(default_factory=list)
    """Callbacks of your own for training, each by the path to import it by, as in `callbacks=[my_module.Watcher]`: a class with methods
    that are named as Lightning's hooks (docs/callbacks.md). Taken from a recipe or the command line alone; no file of a run holds it."""
    runs: list[PathValue] = Field(default_factory=list)
    """Folders of runs that `stage=report` compares and `stage=status` lists, or globs such as `runs/*`; empty: `run.dir`."""
    allow: list[str] = Field(default_factory=list)
    """Keys that a run which has begun may change for the steps to come, as in `[optim.lr]` or `[curriculum]`; the ledger keeps each change
    with the token from which it holds."""

    @property
    def sources(self) -> list[Path]:
        """Models that `from` names."""
        named = [self.from_] if isinstance(self.from_, str) else self.from_ or []
        return [Path(name) for name in named]

    @property
    def run_folders(self) -> list[Path]:
        """Folders that `runs` names; a glob means those of begun runs."""
        found: list[Path] = []
        for path in self.runs:
            if not set("*?[") & set(str(path)):
                found.append(path)
                continue
            matches = Path(path.anchor or ".").glob(str(path.relative_to(path.anchor)))
            found += [match for match in sorted(matches) if RunFolder(match).config.is_file()]
        return found

    @property
    def data_dir(self) -> Path:
        """Folder with the prepared tokens."""
        return self.data.dir or self.run.folder.data

    @property
    def fetched_dir(self) -> Path:
        """Folder with what `stage=fetch` got for the corpus, in a folder for each source."""
        return self.data_dir / "fetched"

    @property
    def corpus_sources(self) -> dict[str, SourceConfig]:
        """`data.sources` with the `path` of their files, fetched or not."""
        return {
            name: source.model_copy(update={"path": str(self.fetched_dir / name)}) if source.is_fetched else source
            for name, source in self.data.sources.items()
        }

    @model_validator(mode="after")
    def _sections_agree(self) -> "RunConfig":
        limit = self.model.max_position_embeddings
        for number, phase in enumerate(self.curriculum.phases, start=1):
            if phase.seq_len > limit:
                raise ValueError(
                    f"curriculum phase {number}: seq_len={phase.seq_len} is over model.max_position_embeddings={limit}"
                )
            most = self.parallel.micro_batch_tokens
            if most != "auto" and phase.seq_len > most:
                raise ValueError(
                    f"curriculum phase {number}: seq_len={phase.seq_len} is over parallel.micro_batch_tokens="
                    f"{most}; a micro-batch must hold at least one window"
                )
            if phase.seq_len > self.data.chunk_tokens:
                raise ValueError(
                    f"curriculum phase {number}: seq_len={phase.seq_len} is over data.chunk_tokens={self.data.chunk_tokens}; a chunk of "
                    "text must hold at least one window"
                )
            _check_blend(f"curriculum phase {number}", phase.blend or self.curriculum.blend, self.data.source_names)
        if self.validation.eval_len > limit:
            raise ValueError(
                f"validation.eval_len={self.validation.eval_len} is over model.max_position_embeddings={limit}"
            )
        for name, domain in self.validation.domains.items():
            if domain.source is not None and domain.source not in self.data.source_names:
                raise ValueError(
                    f"validation.domains.{name}.source={domain.source} is not in data.sources ({', '.join(self.data.source_names)})"
                )
            if self.curriculum.adapt_blend and domain.for_source not in (None, *self.data.source_names):
                raise ValueError(
                    f"validation.domains.{name}.for_source={domain.for_source} is not in data.sources "
                    f"({', '.join(self.data.source_names)}), whose shares curriculum.adapt_blend moves"
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
        check_fp8_shapes(self, self.precision)
        if self.data.document_mask:
            _check_document_mask(self.model, self.precision, self.parallel)
        if self.model.hidden_size % self.model.num_attention_heads:
            # transformers 5.23 checks this even where head_dim is given, and every export is compared with its Llama.
            raise ValueError(
                f"model.hidden_size={self.model.hidden_size} is not a multiple of model.num_attention_heads="
                f"{self.model.num_attention_heads}; such a model could be trained, but not exported as a Llama"
            )
        return self


def _check_blend(where: str, blend: Mapping[str, float] | None, sources: tuple[str, ...]) -> None:
    if not blend:
        return
    for name, share in blend.items():
        if name not in sources:
            raise ValueError(f"{where}: blend names source '{name}', data.sources has {', '.join(sources)}")
        if share < 0:
            raise ValueError(f"{where}: blend gives source '{name}' the share {share:g}; shares must be 0 or more")
    if not sum(blend.values()):
        raise ValueError(f"{where}: blend gives every source the share 0; the shares must have a sum above 0")


def check_fp8_shapes(config: RunConfig, precision: PrecisionConfig) -> None:
    """Raise ValueError where `precision` is FP8 and cannot multiply the model's matrices or a phase's steps."""
    for number, phase in enumerate(config.curriculum.phases, start=1):
        _check_fp8_tokens(f"curriculum phase {number}", phase, precision)
    check_fp8_widths(config.model, precision, config.parallel)


def _check_document_mask(model: ModelConfig, precision: PrecisionConfig, parallel: ParallelConfig) -> None:
    if parallel.context_parallel > 1:
        raise ValueError(
            f"data.document_mask=true does not go with parallel.context_parallel={parallel.context_parallel}: a rank has parts of "
            "documents only; use parallel.tensor_parallel, or whole windows"
        )
    if precision.fp8_attention:
        raise ValueError(
            "data.document_mask=true does not go with precision.fp8_attention=true: FP8 attention of packed documents was not tried"
        )
    if model.head_dim & (model.head_dim - 1):
        raise ValueError(f"data.document_mask=true needs a power of two as model.head_dim, not {model.head_dim}")


def _check_fp8_tokens(where: str, phase: PhaseConfig, precision: PrecisionConfig) -> None:
    multiple = precision.token_multiple
    if phase.tokens_per_step % multiple:
        raise ValueError(
            f"{where}: tokens_per_step={phase.tokens_per_step} is not a multiple of {multiple}; precision={precision.name} "
            f"multiplies matrices with a multiple of {multiple} tokens only"
        )


def check_fp8_widths(model: ModelConfig, precision: PrecisionConfig, parallel: ParallelConfig) -> None:
    """Raise ValueError where FP8 cannot multiply the model's matrices; nothing in other formats."""
    if not precision.is_fp8:
        return
    multiple, tensor_parallel = precision.width_multiple, parallel.tensor_parallel
    split = f" / parallel.tensor_parallel={tensor_parallel}" if tensor_parallel > 1 else ""
    widths = {
        f"model.hidden_size={model.hidden_size}": model.hidden_size * tensor_parallel,
        f"model.ffn_hidden_size={model.ffn_hidden_size}{split}": model.ffn_hidden_size,
        f"model.num_attention_heads x head_dim={model.num_attention_heads} x {model.head_dim}{split}": (
            model.num_attention_heads * model.head_dim
        ),
        f"model.kv_groups x head_dim={model.kv_groups} x {model.head_dim}{split}": model.kv_groups * model.head_dim,
    }
    for name, width in widths.items():
        if width % (multiple * tensor_parallel):
            raise ValueError(
                f"{name} is not a multiple of {multiple}, which precision={precision.name} needs of every matrix in a layer"
            )
