"""Layout of a run's folder (`run.dir`): the one place that names the files and folders in it. Nothing here touches the disk but
`in_phase_results`, which lists files."""

import re
from dataclasses import dataclass
from pathlib import Path

MODEL_SOURCES = "the folder of a run or of a checkpoint, a .nemo file, or a Hugging Face folder"
"""Where a trained model may lie."""
TOKENIZER_RECORD = "fingerprint.json"
"""File in a saved tokenizer's folder: the fingerprint, the special tokens, and what the tokenizer was built from."""
_IN_PHASE_NAME = re.compile(r"phase-[0-9]{2,}-tokens-([0-9]{15})\.json")


@dataclass(frozen=True)
class RunFolder:
    """Paths of everything that a run leaves behind."""

    root: Path

    @property
    def config(self) -> Path:
        """The resolved configuration, which workers read."""
        return self.root / "config.yaml"

    @property
    def environment(self) -> Path:
        """Commands, versions and hardware that the run was made with."""
        return self.root / "environment.json"

    @property
    def lock(self) -> Path:
        """The file whose lock the launcher at work holds."""
        return self.root / ".lock"

    @property
    def preempted(self) -> Path:
        """A file that is there while the last command was stopped by a scheduler's signal."""
        return self.root / "preempted"

    @property
    def tokenizer(self) -> Path:
        """The run's tokenizer."""
        return self.root / "tokenizer"

    @property
    def data(self) -> Path:
        """Prepared tokens, unless `data.dir` names another folder (`RunConfig.data_dir`)."""
        return self.root / "data"

    @property
    def checkpoints(self) -> Path:
        """Folder of a `CheckpointStore`."""
        return self.root / "checkpoints"

    @property
    def metrics(self) -> Path:
        """Records of training, one JSON object on each line."""
        return self.root / "metrics.jsonl"

    @property
    def trackers(self) -> Path:
        """What Weights & Biases and MLflow keep."""
        return self.root / "trackers"

    @property
    def skipped_updates(self) -> Path:
        """Reports of updates that the guard skipped."""
        return self.root / "skipped_updates"

    @property
    def validation(self) -> Path:
        """Results of validation."""
        return self.root / "validation"

    @property
    def validation_documents(self) -> Path:
        """Tokens of the validation documents, kept for the next validation."""
        return self.validation / "documents"

    @property
    def validation_of_others(self) -> Path:
        """Results of other models than the run's own (`stage=validate from=`)."""
        return self.validation / "from"

    @property
    def evaluation(self) -> Path:
        """Results of `stage=evaluate`."""
        return self.root / "evaluation"

    @property
    def export(self) -> Path:
        """The exported model in all its formats."""
        return self.root / "export"

    @property
    def unfinished_export(self) -> Path:
        """An export while it is written and compared."""
        return self.root / ".export.tmp"

    @property
    def export_record(self) -> Path:
        """What was exported from which checkpoint."""
        return self.export / "export.json"

    @property
    def report(self) -> Path:
        """The page about the run, unless `report.dir` names another folder."""
        return self.root / "report"

    @property
    def plan(self) -> Path:
        """The forecast of `stage=plan`."""
        return self.root / "plan.json"

    @property
    def bench(self) -> Path:
        """Results of `stage=bench`."""
        return self.root / "bench"

    @property
    def tokenizer_comparison(self) -> Path:
        """Results of `stage=compare_tokenizers`, and the control that they are compared with."""
        return self.root / "tokenizer_comparison"

    @property
    def slurm(self) -> Path:
        """Scripts, logs and records of a chain of jobs."""
        return self.root / "slurm"

    @property
    def slurm_config(self) -> Path:
        """The configuration that the jobs of a chain read."""
        return self.slurm / "config.yaml"

    @property
    def slurm_chain(self) -> Path:
        """The submitted jobs in order."""
        return self.slurm / "chain.json"

    def slurm_note(self, task: str) -> Path:
        """How the last job of a task stands."""
        return self.slurm / f"{task}.json"

    def slurm_script(self, task: str) -> Path:
        """The script of a task's job."""
        return self.slurm / f"{task}.sh"

    def slurm_log(self, task: str, job_id: int | str) -> Path:
        """What a job prints, all of its restarts in one file."""
        return self.slurm / f"{task}-{job_id}.out"

    def log(self, name: str) -> Path:
        """All that the launcher (`launcher`) or the task of a worker has printed."""
        return self.root / "logs" / f"{name}.log"

    def phase_result(self, number: int) -> Path:
        """The validation at the end of a phase."""
        return self.validation / f"phase-{number:02d}.json"

    def checkpoint_result(self, checkpoint: str) -> Path:
        """The validation of the checkpoint of this name by `stage=validate`."""
        return self.validation / f"{checkpoint}.json"

    def in_phase_result(self, number: int, tokens: int) -> Path:
        """A validation inside a phase, after `tokens` of the run."""
        return self.validation / f"phase-{number:02d}-tokens-{tokens:015d}.json"

    def in_phase_results(self) -> list[tuple[int, Path]]:
        """(tokens of the run, file) of all validations inside phases, in order."""
        found = ((_IN_PHASE_NAME.fullmatch(path.name), path) for path in self.validation.glob("phase-*.json"))
        return sorted((int(match[1]), path) for match, path in found if match)
