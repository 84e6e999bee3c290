"""The scripts of docs/serving.md on an export: each engine that is installed reads it and writes what the checkpoint does."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.export.conftest import MakeRun
from yxanul_nemo.config.conf_files import REPO_DIR
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.export.export import export_checkpoint

SCRIPTS = Path("benchmarks", "serving")


@pytest.fixture(scope="module")
def run(make_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    """A run with an export in all formats, and the answers of its checkpoint."""
    config, _ = make_run("export.formats=[nemo,hf,gguf]")
    export_checkpoint(config)
    answers = tmp_path_factory.mktemp("answers") / "answers.json"
    result = say("answers.py", config.run.dir / "export", answers)
    assert result.returncode == 0, result.stderr
    return config, answers


def say(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / script), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(REPO_DIR), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=REPO_DIR, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("script", "package"), [("with_transformers.py", "transformers"), ("with_llama_cpp.py", "xllamacpp")])  # fmt: skip
def test_an_engine_agrees_with_the_checkpoint(run: tuple[RunConfig, Path], script: str, package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    config, answers = run
    result = say(script, config.run.dir / "export", answers)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "EOS before them: 10 of 10" in result.stdout


def test_a_wrong_answer_is_reported(run: tuple[RunConfig, Path], tmp_path: Path) -> None:
    config, answers = run
    told = json.loads(answers.read_text())
    row = max(told["answers"], key=lambda row: row["margins"][0])
    row["tokens"][0] += 1
    (tmp_path / "wrong.json").write_text(json.dumps(told))
    result = say("with_transformers.py", config.run.dir / "export", tmp_path / "wrong.json")
    assert result.returncode == 1 and f"{row['prompt']!r}: 0 equal tokens" in result.stdout


def test_megatrons_dataset_reads_the_corpus(run: tuple[RunConfig, Path]) -> None:
    config, _ = run
    prefix = next((config.data_dir / "prose" / "train").glob("*.bin")).with_suffix("")
    result = say("with_gpt_dataset.py", prefix, config.run.folder.tokenizer)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "ends with EOS, once: True" in result.stdout
