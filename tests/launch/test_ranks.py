"""torchrun's ends in few words: what the first rank that fails ends with."""

import subprocess
import sys
from pathlib import Path

import pytest

REPO_DIR = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("sys.exit(2 if os.environ['RANK'] == '1' else time.sleep(60))", 2, ""),
        (
            "os.kill(os.getpid(), 9) if os.environ['RANK'] == '1' else time.sleep(60)",
            137,
            "rank 1 was killed by SIGKILL",
        ),
    ],
)
def test_the_first_failure_decides(tmp_path: Path, end: str, code: int, said: str) -> None:
    (tmp_path / "rank.py").write_text(f"import os, sys, time\n{end}\n")
    command = ["-m", "yxanul_nemo.launch.ranks", "--nproc-per-node=2", "--standalone", str(tmp_path / "rank.py")]
    done = subprocess.run([sys.executable, *command], cwd=REPO_DIR, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert said in done.stderr and "Traceback" not in done.stderr
