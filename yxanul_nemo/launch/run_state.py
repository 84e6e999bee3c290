"""What of a run is done, by what lies in its folder, and what can be checked before any of the rest is spent. Light."""

from data_prep.corpus.manifest import MANIFEST_NAME, load_manifest
from yxanul_nemo.checkpoint.committed import Checkpoint
from yxanul_nemo.checkpoint.going_on import require_allowed
from yxanul_nemo.checkpoint.identity import expected_run
from yxanul_nemo.checkpoint.store import CheckpointStore
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.curriculum.phases import check_enough_tokens, plan_phases, selected_phases, source_sizes
from yxanul_nemo.errors import UserError
from yxanul_nemo.export.record import is_exported
from yxanul_nemo.launch.tasks import Task
from yxanul_nemo.plan.needs import check_formats, check_tokenizer, check_trackers
from yxanul_nemo.user_callbacks import check_callbacks
from yxanul_nemo.validation.files import check_domain_files, check_heldout
from yxanul_nemo.validation.record import early_stop_tokens, find_result, read_tokens


class RunState:
    """The chosen stages of one run as tasks, and which of them are done.

    Args:
        stages: some of fetch, data, train, validate, export.
    """

    def __init__(self, config: RunConfig, stages: list[str]):
        self.config, self.stages = config, stages
        self.store = CheckpointStore.of_run(config)
        self.phases = plan_phases(config.curriculum)
        phases = selected_phases(config.phases, len(config.curriculum.phases)) if "train" in stages else []
        self.tasks = [Task("train", number) for number in phases]
        self.tasks += [Task(stage) for stage in ("validate", "export") if stage in stages]
        self._newest_of: tuple[list[str] | None, Checkpoint | None] = (None, None)

    @property
    def has_data(self) -> bool:
        """Whether the corpus is prepared."""
        return (self.config.data_dir / MANIFEST_NAME).is_file()

    def todo(self) -> list[Task]:
        """The tasks that are not done; preparing the corpus is not among them."""
        return [task for task in self.tasks if not self.is_done(task)]

    def is_done(self, task: Task) -> bool:
        """Whether nothing of a task is left to do. What follows training is not done while a chosen phase is not."""
        if task.kind == "data":
            return self.has_data
        newest = self.newest()
        if newest is None:
            return False
        if task.kind == "train":
            return self._is_trained(task.phase, newest)
        if not all(self._is_trained(other.phase, newest) for other in self.tasks if other.kind == "train"):
            return False
        if task.kind == "validate":
            return find_result(self.config, newest) is not None
        return is_exported(self.config, newest)

    def newest(self) -> Checkpoint | None:
        """The checkpoint to go on from, looked for anew when there are other ones than before.

        Those that workers have committed since the first look were hashed by them, and will be once more before they are loaded.
        """
        digests = [checkpoint.manifest.digest for checkpoint in self.store.list()]
        known, _ = self._newest_of
        if digests != known:
            store = self.store if known is None else CheckpointStore.of_run(self.config, verify="size")
            self._newest_of = (digests, store.newest_good())
        return self._newest_of[1]

    def check_before_data(self, todo: list[Task]) -> None:
        """What needs no corpus; raises UserError."""
        if "train" in self.stages and (newest := self.newest()) is not None:
            # Before a corpus is changed that other settings began with.
            expected = expected_run(self.config, None, self.phases)
            require_allowed(newest.read_ledger(), expected, self.config.allow, newest.path, corpus_known=False)
        if any(task.kind != "export" for task in todo):
            check_domain_files(self.config.validation, are_to_come=self.config.cluster.dry_run)
        if any(task.kind == "train" for task in todo):
            check_trackers(self.config.logging)
            check_callbacks(self.config.callbacks)
        if any(task.kind == "export" for task in todo):
            check_formats(self.config.export)
            _check_keeps_formats(self.config)
        if todo and "data" not in self.stages and self.has_data:
            check_tokenizer(self.config)
        if todo and "train" not in self.stages and self.newest() is None:
            raise self.store.no_checkpoint()

    def check_with_data(self, todo: list[Task]) -> None:
        """The prepared corpus and the newest checkpoint against the configured run; raises UserError."""
        config = self.config
        manifest = load_manifest(config.data_dir)
        sizes = source_sizes(config, manifest)
        if any(task.kind != "export" for task in todo):
            check_heldout(config.validation, manifest)
        if any(task.kind == "export" for task in todo) and "gguf" in config.export.formats:
            from data_prep.tokenizers.tokenizer import Tokenizer
            from yxanul_nemo.export.gguf_rules import require_expressible

            folder = config.run.folder.tokenizer
            require_expressible(Tokenizer.load(folder), folder)
        if "train" not in self.stages:
            return
        check_enough_tokens(config, self.phases, sizes)
        if (newest := self.newest()) is not None:
            # The worker does this again; here it comes before its imports, and for finished runs.
            expected = expected_run(config, manifest, self.phases)
            require_allowed(newest.read_ledger(), expected, config.allow, newest.path)

    def _is_trained(self, number: int, newest: Checkpoint) -> bool:
        """Whether a phase is trained and validated, or left out by an early stop. Having begun phase n + 1 means that n was ended."""
        stopped = early_stop_tokens(self.config)
        if stopped is not None and newest.tokens >= stopped:
            return True
        if newest.phase < number or (newest.phase == number and not newest.phase_end):
            return False
        if newest.phase == number and newest.read_ledger().phase_tokens < self.phases[number - 1].tokens:
            # It was ended, and is to be longer now.
            return False
        result = self.config.run.folder.phase_result(number)
        if result.is_file():
            return newest.phase > number or read_tokens(result) == newest.tokens
        return not any(c.phase == number and c.phase_end for c in self.store.list())


FORMAT_NAMES = {"nemo": "model.nemo", "hf": "hf", "gguf": "model.gguf"}
"""Format -> its file or folder in an export."""


def _check_keeps_formats(config: RunConfig) -> None:
    """Refuse to replace an export by one that lacks a format which it has."""
    lost = [
        name
        for name, file in FORMAT_NAMES.items()
        if name not in config.export.formats and (config.run.folder.export / file).exists()
    ]
    if lost:
        every = ",".join([*lost, *config.export.formats])
        raise UserError(
            "export.formats",
            f"is [{','.join(config.export.formats)}], and {config.run.folder.export} has {' and '.join(lost)} too, which would be removed",
            f"[{every}]",
            f"Write all with export.formats=[{every}], or move that folder away first.",
        )
