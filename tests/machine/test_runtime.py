"""Ranks that never come: the process that waits for them says so and answers signals."""

import os
import signal
import subprocess
import sys
from pathlib import Path

PROGRAM = """
from yxanul_nemo.machine import runtime
from yxanul_nemo.config.load import compose, parse
from yxanul_nemo.log import configure_logging
configure_logging()
runtime.QUIET_JOIN_SECONDS = 0.1
runtime.init_process_groups(parse(compose()).parallel, "cpu", seed=1)
"""


def test_waiting_for_ranks_says_so_and_ends_on_ctrl_c() -> None:
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        cwd=Path(__file__).parents[2],
        env=os.environ | place,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = process.stderr.readline()
    while "waits at" not in line and line:
        line = process.stderr.readline()
    assert "rank 0 waits at 127.0.0.1:0 for all of 2 ranks" in line
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 128 + signal.SIGINT
    process.stderr.close()
