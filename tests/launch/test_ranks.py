"""torchrun's ends in few words: what the first rank that fails ends with."""

import subprocess
import sys
from pathlib import Path

REPO_DIR = Path(__file__).resolve().parents[2]


def test_the_first_failure_decides_without_torchruns_traceback(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(
        "import os, sys, time\nsys.exit(2 if os.environ['RANK'] == '1' else time.sleep(60))\n"
    )
    command = ["-m", "yxanul_nemo.launch.ranks", "--nproc-per-node=2", "--standalone", str(tmp_path / "rank.py")]
    done = subprocess.run([sys.executable, *command], cwd=REPO_DIR, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
