"""torchrun for the ranks of a task, whose words about failures are kept to those that help: `python -m yxanul_nemo.launch.ranks ARGS`."""

import logging
import sys

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun


def main() -> int:
    """Exit code: that of the rank that failed first (a signal as 128 + N), 1 if torchrun itself was stopped."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        torchrun(sys.argv[1:])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        # The rank has told the user's mistake, or shown its traceback, itself.
        if failure.exitcode < 0:
            print(f"rank {rank} was killed by {failure.signal_name()}", file=sys.stderr)
            return 128 - failure.exitcode
        return failure.exitcode
    except SignalException as error:
        print(f"torchrun was stopped by {error.sigval.name}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
