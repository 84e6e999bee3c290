"""Python imports this at the start of every process that has the folder on its path: launchers under test and their workers.

A process that is about to give a file or folder the name in YXANUL_TEST_STOP_AT stops there, as by SIGSTOP, until SIGCONT.
"""

import os
import signal
import sys

NAME = os.environ.get("YXANUL_TEST_STOP_AT")


def _stop(event: str, arguments: tuple) -> None:
    if event == "os.rename" and str(arguments[1]).endswith(f"/{NAME}"):
        os.kill(os.getpid(), signal.SIGSTOP)


if NAME:
    sys.addaudithook(_stop)
