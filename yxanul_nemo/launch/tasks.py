"""What the launcher has done in worker processes."""

from dataclasses import dataclass

STAGES = ("fetch", "data", "train", "validate", "export")
"""The stages of the pipeline, in order."""


@dataclass(frozen=True)
class Task:
    """What a worker is to do."""

    kind: str
    """train, validate or export; data too where stages are jobs of their own."""
    phase: int = 0
    """Phase of a train task."""

    @property
    def name(self) -> str:
        """For messages, file names and the worker's command line; `named` reads it back."""
        return f"phase-{self.phase:02d}" if self.kind == "train" else self.kind

    @classmethod
    def named(cls, name: str) -> "Task":
        """The task of this name."""
        kind, _, phase = name.partition("-")
        return cls("train", int(phase)) if kind == "phase" else cls(kind)
