"""`notify.command`: what is told when a run ends, fails or is preempted."""

import json
import os
import signal
import socket
import subprocess
import time
from typing import Literal

from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.log import logger

PATIENCE_SECONDS = 30.0
"""How long a notice may take; the run does not wait longer for it."""

Event = Literal["end", "failure", "preemption"]


def notify(config: RunConfig, event: Event, message: str) -> None:
    """Run the configured command with the notice as JSON on its standard input; what goes wrong with it is a warning."""
    if config.notify.command is None or event not in config.notify.events:
        return
    notice = {
        "event": event,
        "run": config.run.name,
        "run_dir": str(config.run.dir.absolute()),
        "message": message,
        "host": socket.gethostname(),
        "time_unix": time.time(),
    }
    environment = os.environ | {"YXANUL_EVENT": event, "YXANUL_RUN": config.run.name, "YXANUL_MESSAGE": message}
    with subprocess.Popen(
        # The shell is asked for by name: the command is the user's own, and no file of a run can name it.
        ["/bin/sh", "-c", config.notify.command],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            said, _ = process.communicate(json.dumps(notice), PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            logger.warning("notify.command took longer than %.0f s and was ended", PATIENCE_SECONDS)
            return
    if process.returncode:
        logger.warning("notify.command ended with code %d: %s", process.returncode, said.strip()[-500:])
