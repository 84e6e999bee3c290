"""The pointer to a run's best checkpoint, a file of its own beside the checkpoints."""

from pathlib import Path

from pydantic import Field, ValidationError

from yxanul_nemo.checkpoint.committed import CHECKPOINT_NAME, load_checkpoint
from yxanul_nemo.files import write_json_atomic
from yxanul_nemo.json_files import parse_json
from yxanul_nemo.log import logger
from yxanul_nemo.stored import Stored, first_problem

BEST_NAME = "best"


class BestPointer(Stored):
    """Which checkpoint was best, and by what."""

    checkpoint: str = Field(pattern=rf"^{CHECKPOINT_NAME.pattern}$")
    """Name of its folder."""
    digest: str
    """Digest of its manifest: another checkpoint that comes to have its name is not meant."""
    metric: str
    value: float
    """Of the metric; lower is better."""

    @classmethod
    def read(cls, root: Path) -> "BestPointer | None":
        """Return the pointer if it names a committed checkpoint that is still the one it was set for; None otherwise, with the
        reason in the log where there is a pointer."""
        path = root / BEST_NAME
        try:
            pointer = cls.model_validate(parse_json(path.read_bytes()))
            if load_checkpoint(root / pointer.checkpoint).manifest.digest == pointer.digest:
                return pointer
        except FileNotFoundError:
            return None
        except ValidationError as error:
            logger.warning("ignoring the pointer %s: %s", path, first_problem(error))
            return None
        except (OSError, ValueError, RecursionError) as error:
            logger.warning("ignoring the pointer %s: %s", path, error)
            return None
        logger.warning("ignoring the pointer %s: it does not name a checkpoint that is here", path)
        return None

    def write(self, root: Path) -> None:
        """Put it in place of the one that is there."""
        write_json_atomic(root / BEST_NAME, self.model_dump())
