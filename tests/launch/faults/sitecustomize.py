"""Python imports this at the start of every process that has the folder on its path: launchers under test and their workers.

A process that is about to give a file or folder the name in YXANUL_TEST_STOP_AT stops there, as by SIGSTOP, until SIGCONT.
"""

import os
import signal
import sys
import threading

NAME = os.environ.get("YXANUL_TEST_STOP_AT")


def _stop(event: str, arguments: tuple) -> None:
    if event == "os.rename" and str(arguments[1]).endswith(f"/{NAME}"):
        # To this thread: another one might take a signal to the process, and this one go on for a moment.
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


if NAME:
    sys.addaudithook(_stop)
