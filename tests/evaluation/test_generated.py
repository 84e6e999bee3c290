"""Problems by generation: what counts as right, and programs in their sandbox."""

import json
import socket
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from yxanul_nemo.checkpoint.committed import Checkpoint
from yxanul_nemo.config.load import compose, parse
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.evaluation import generated
from yxanul_nemo.evaluation.generated import HUMANEVAL_STOPS, final_number, gsm8k, humaneval, until
from yxanul_nemo.evaluation.sandbox import run_program
from yxanul_nemo.export.generate import Generated
from yxanul_nemo.export.source import Loaded, load_source

MIB = 1 << 20
HUMANEVAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "validation" / "humaneval_validation.parquet"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7\n#### 7", 7),
        ("#### 1,234", 1234),
        ("#### $-5.50 each", -5.5),
        ("The answer is 12. No, 13", 13),
        ("it costs 2,000,000 dollars", 2_000_000),
        ("none", None),
        ("", None),
    ],
)
def test_the_answers_number(text: str, number: float | None) -> None:
    assert final_number(text) == number


def test_a_function_ends_where_the_next_thing_begins() -> None:
    assert until("    return 1\n\ndef g():\n  pass", HUMANEVAL_STOPS) == "    return 1\n"
    assert until("    return 1\n    # inside\n", HUMANEVAL_STOPS) == "    return 1\n    # inside\n"
    assert until("x\nprint(1)\nclass A", HUMANEVAL_STOPS) == "x"


@pytest.mark.parametrize(
    ("program", "kind"),
    [
        ("import math, collections\nassert math.sqrt(4) == 2", "passed"),
        ("assert 1 == 2", "failed"),
        ("def (", "failed"),
        ("import sys; sys.exit(0)", "failed"),
        ("import os; os._exit(0)", "failed"),
        ("print('x' * 100)", "passed"),
        ("raise KeyboardInterrupt", "failed"),
        ("x = bytearray(900 * 1024 * 1024)", "failed"),
        ("files = [open('/dev/null') for _ in range(100)]", "failed"),
        ("import os; assert dict(os.environ).keys() <= {'HOME', 'LC_CTYPE'}; assert os.listdir('.') == []", "passed"),
    ],
)
def test_programs_pass_only_by_reaching_their_end(program: str, kind: str) -> None:
    assert run_program(program, 10, 512 * MIB).kind == kind


@pytest.mark.parametrize(
    "program",
    ["while True: pass", "import time; time.sleep(60)", "import signal, time\nsignal.signal(15, 1)\ntime.sleep(60)"],
)
def test_programs_that_do_not_end_are_ended(program: str) -> None:
    assert run_program(program, 0.5, 512 * MIB).kind == "out of time"


@pytest.mark.parametrize(
    "program",
    [
        "open({path!r}, 'w')",
        "open({path!r}, 'a').write('lost')",
        "open({path!r}, 'r+')",
        "import os; os.open({path!r}, os.O_RDWR)",
        "import os; os.remove({path!r})",
        "import os; os.rename({path!r}, {path!r} + '2')",
        "import os; os.truncate({path!r}, 0)",
        "import shutil; shutil.rmtree({folder!r})",
        "import pathlib; pathlib.Path({path!r}).write_text('lost')",
        "import os; os.system('rm ' + {path!r})",
        "import subprocess; subprocess.run(['rm', {path!r}])",
        "import os; os.execv('/bin/rm', ['rm', {path!r}])",
        "import os; os.fork()",
        "import os; os.kill(os.getppid(), 9)",
        "import socket; socket.create_connection(('127.0.0.1', {port}), 2)",
        "import ctypes; ctypes.CDLL(None)",
    ],
)
def test_what_is_outside_stays_as_it_is(tmp_path: Path, program: str) -> None:
    path = tmp_path / "file"
    path.write_text("kept")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert (
            run_program(program.format(path=str(path), folder=str(tmp_path), port=port), 10, 512 * MIB).kind == "failed"
        )
        server.settimeout(0.05)
        with pytest.raises(TimeoutError):
            server.accept()
    assert path.read_text() == "kept" and list(tmp_path.iterdir()) == [path]


def test_files_may_be_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    assert run_program(f"assert open({str(tmp_path / 'file')!r}).read() == 'kept'", 10, 512 * MIB).kind == "passed"


@pytest.mark.skipif(not HUMANEVAL.is_file(), reason="HumanEval is not here")
def test_humanevals_own_solutions_pass_and_empty_functions_fail() -> None:
    for row in pq.read_table(HUMANEVAL).to_pylist()[::8]:
        for body, kind in ((row["canonical_solution"], "passed"), ("    return None\n", "failed")):
            program = f"{row['prompt']}{body}\n{row['test']}\ncheck({row['entry_point']})\n"
            assert run_program(program, 10, 512 * MIB).kind == kind, row["task_id"]


def write(folder: Path, name: str, rows: list[dict]) -> None:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def config(exported: tuple[RunConfig, Checkpoint], tmp_path: Path) -> RunConfig:
    settings = (
        f"validation.dir={tmp_path}", "evaluate.gsm8k_path=math.jsonl", "evaluate.humaneval_path=code.jsonl",
        "evaluate.run_generated_code=true", "evaluate.tasks=[gsm8k,humaneval]", "evaluate.max_new_tokens=8",
    )  # fmt: skip
    return parse(compose([f"run.dir={exported[0].run.dir}", *settings]))


def test_right_answers_are_counted(
    config: RunConfig, tmp_path: Path, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "math.jsonl", [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(8)])
    seen = []

    def knows_half(loaded: Loaded, prompt: str, *_: object, **__: object) -> Generated:
        seen.append(prompt)
        number = int(prompt.split()[1])
        return Generated(f" so #### {number + 1 + number % 2}\nQuestion: 5? #### 77", 3)

    monkeypatch.setattr(generated, "generate_with", knows_half)
    score = gsm8k(config, loaded)
    assert (score.problems, score.pass_at_1) == (8, 0.5)
    assert seen[0] == "Question: 0 + 1?\nAnswer:"
    bodies = iter(["    return a + b\n\ndef g(", "    return a - b", "    while True: pass", "    return a +"])
    monkeypatch.setattr(generated, "generate_with", lambda *_, **__: Generated(next(bodies), 3))
    problem = {"prompt": "def add(a, b):\n", "test": "def check(f):\n    assert f(2, 3) == 5", "entry_point": "add"}
    write(tmp_path, "code.jsonl", [problem] * 4)
    quick = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"time_limit_seconds": 1.0})})
    score = humaneval(quick, loaded)
    assert (score.problems, score.pass_at_1, score.out_of_time) == (4, 0.25, 1)


def test_a_real_model_gives_answers_of_its_own(config: RunConfig, tmp_path: Path, loaded: Loaded) -> None:
    write(tmp_path, "math.jsonl", [{"question": "1 + 1?", "answer": "#### 2"}] * 3)
    assert gsm8k(config, loaded).problems == 3
    two = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"problems": 2})})
    assert gsm8k(two, loaded).problems == 2
    write(tmp_path, "math.jsonl", [{"question": "word " * 300, "answer": "#### 2"}])
    assert gsm8k(config, loaded).pass_at_1 == 0, "a prompt that fills the context has no answer"


@pytest.fixture(scope="module")
def loaded(exported: tuple[RunConfig, Checkpoint]) -> Loaded:
    return load_source(exported[0].run.dir / "export" / "hf", device="cpu")


def test_mistakes_are_named(config: RunConfig, loaded: Loaded, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluate\.gsm8k_path: .*math\.jsonl does not exist"):
        gsm8k(config, loaded)
    write(tmp_path, "code.jsonl", [{"prompt": "x"}])
    with pytest.raises(UserError, match=r"evaluate\.humaneval_path.*names key 'test'"):
        humaneval(config, loaded)
    with pytest.raises(UserError, match="runs what the model wrote; allow it with run_generated_code=true"):
        parse(compose(["evaluate.tasks=[humaneval]"]))
