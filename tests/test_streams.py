"""A process goes on when what it prints has no reader, no terminal, no room on the disk or no descriptor."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

REPO_DIR = Path(__file__).parents[1]
PROGRAM = """
import logging, os, sys, warnings
from pathlib import Path
from yxanul_nemo.streams import outlive_reader, say
outlive_reader(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
logging.basicConfig(stream=sys.stderr)
sys.stdin.readline()
for i in range(20):
    print("printed", i, flush=True)
    logging.warning("logged %d", i)
    say(b"said %d" % i, b" and told")
sys.stderr.buffer.write(b"raw\\n")
sys.stderr.flush()
opened = open(os.devnull)
assert opened.fileno() > 2
Path("done").write_text("x")
sys.exit(7)
"""
ALL = [f"{word} {i}" for i in range(20) for word in ("printed", "logged", "said")] + ["raw"]


def start(folder: Path, *arguments: object, **streams: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPO_DIR)},
        stdin=subprocess.PIPE,
        **streams,
    )


def end(process: subprocess.Popen) -> None:
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.wait(60) == 7


@pytest.mark.parametrize("kind", ["pipe", "terminal", "full disk"])
@pytest.mark.parametrize("logged", [True, False])
def test_what_cannot_be_read_goes_into_the_log(tmp_path: Path, kind: str, logged: bool) -> None:
    arguments = [tmp_path / "logs" / "task.log"] if logged else []
    if kind == "full disk":
        with open("/dev/full", "wb") as full:
            process = start(tmp_path, *arguments, stdout=full, stderr=full)
    else:
        reader, writer = os.pipe() if kind == "pipe" else pty.openpty()
        process = start(tmp_path, *arguments, stdout=writer, stderr=writer)
        os.close(writer)
        os.close(reader)
    end(process)
    assert (tmp_path / "done").exists()
    if logged:
        text = arguments[0].read_text()
        assert [line for line in ALL if line not in text] == []
        assert "told" not in text and text.startswith("nobody reads what this process prints")


def test_a_reader_gets_what_is_told_and_after_it_has_gone_the_log_gets_the_rest(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    process = start(tmp_path, tmp_path / "task.log", stdout=writer, stderr=subprocess.DEVNULL)
    os.close(writer)
    process.stdin.write(b"\n")
    process.stdin.flush()
    first = os.read(reader, 20)
    os.close(reader)
    assert first.startswith(b"printed 0\n")
    end(process)


def test_descriptors_that_are_closed_get_no_file_of_ours(tmp_path: Path) -> None:
    command = f"{sys.executable} -c '{PROGRAM}' task.log >&- 2>&-"
    environment = os.environ | {"PYTHONPATH": str(REPO_DIR)}
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, input=b"\n", check=False)
    assert done.returncode == 7 and (tmp_path / "done").exists()


def test_a_terminal_that_another_program_has_made_non_blocking_gets_everything(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    program = "from yxanul_nemo.streams import outlive_reader; outlive_reader(); print('x' * 300_000); print('end')"
    process = subprocess.Popen([sys.executable, "-c", program], cwd=REPO_DIR, stdout=writer)
    os.close(writer)
    with open(reader, "rb") as pipe:
        assert pipe.read() == b"x" * 300_000 + b"\nend\n"
    assert process.wait(60) == 0


@pytest.mark.parametrize("arguments", [["--help"], ["stage=plan"], ["--cfg", "job"]])
def test_the_head_of_what_the_launcher_prints_is_enough(arguments: list[str], tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "launcher.py", *arguments, *([] if "--help" in arguments else [f"run.dir={tmp_path}"])],
        cwd=REPO_DIR,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 0
