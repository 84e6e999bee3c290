"""What a run needs is said first: what is here, what a stage gets, what is missing and how it is mended."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.tokenizers.tokenizer import Tokenizer
from tests.plan.test_needs import complete
from yxanul_nemo.config.command_line import for_hydra
from yxanul_nemo.config.data import SourceConfig
from yxanul_nemo.config.load import compose, parse
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.plan import preflight
from yxanul_nemo.plan.preflight import Need, needs_of
from yxanul_nemo.plan.source_sizes import source_size
from yxanul_nemo.plan.stage import run_plan_stage

__all__ = ["complete"]
REPOSITORY = Path(__file__).parents[2]


def found(config: RunConfig) -> dict[str, Need]:
    return {need.what: need for need in needs_of(config)}


def settings_of(tmp_path: Path, *more: str) -> RunConfig:
    return parse(compose(for_hydra([f"run.dir={tmp_path}/run", *more])))


def test_what_is_here_is_named_with_its_size(complete: Callable[..., RunConfig]) -> None:
    needs = found(complete())
    assert {need.state for need in needs.values()} == {"here"}
    assert "1 shard" in needs["data text"].found
    assert "which" not in needs["tokenizer superbpe_t80k"].found


def test_what_a_stage_gets_is_said_with_its_licence(complete: Callable[..., RunConfig], tmp_path: Path) -> None:
    absent = ("data.sources.text.path=null", f"validation.dir={tmp_path}/absent", "tokenizer.path=null")
    needs = found(complete(*absent))
    coming = {what: need for what, need in needs.items() if need.state == "to come"}
    assert set(coming) == {
        "data text",
        "tokenizer superbpe_t80k",
        "validation english",
        "validation math",
        "validation code",
    }
    assert all("stage=fetch" in need.command for need in coming.values())
    assert "HuggingFaceFW/fineweb-edu (ODC-By 1.0" in coming["data text"].found
    assert "Apache-2.0" in coming["tokenizer superbpe_t80k"].found


@pytest.mark.parametrize(
    ("settings", "what", "words"),
    [
        (["data.sources.text.path=/absent"], "data text", "/absent does not exist"),
        (["data.sources.text.text_column=n"], "data text", "of type int64"),
        (["tokenizer.path=/absent"], "tokenizer superbpe_t80k", "/absent does not exist"),
        (["validation.domains.english.template={txt}"], "validation english", "names column 'txt'"),
    ],
)
def test_what_is_missing_has_what_mends_it(
    complete: Callable[..., RunConfig], settings: list[str], what: str, words: str
) -> None:
    need = found(complete(*settings))[what]
    assert need.state == "missing" and words in need.found


@pytest.mark.parametrize(("driver", "state"), [("570.86.15", "missing"), ("580.65.06", "here"), (None, "missing")])
def test_a_driver_that_is_too_old_for_cuda_13_is_named(
    complete: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, driver: str | None, state: str
) -> None:
    monkeypatch.setattr(preflight, "found_gpus", lambda: ["NVIDIA H100 80GB HBM3"])
    monkeypatch.setattr(preflight, "nvidia_driver", lambda: driver)
    need = found(complete())["driver"]
    assert need.state == state and ("nvidia-driver-580-open" in need.command) == (state == "missing")


def test_a_prepared_corpus_is_counted_exactly(prepared: Path, make_config: Callable[..., RunConfig]) -> None:
    config = make_config(f"run.dir={prepared}")
    manifest = json.loads((prepared / "data" / "manifest.json").read_text())
    tokens = sum(entry["tokens"] for entry in manifest["sources"]["prose"]["train"])
    assert f"{tokens / 1000:.4g}k tokens are prepared" in found(config)["data prose"].found
    assert found(config)["tokenizer demo"].state == "here"


def test_estimates_are_near_what_preparing_finds(
    prepared: Path, make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """Each source of a prepared corpus, from its footers alone, as parquet and rewritten in another format."""
    folder = prepared / "data" / "corpus"
    manifest = json.loads((prepared / "data" / "manifest.json").read_text())["sources"]["prose"]
    text_bytes = sum(entry["text_bytes"] for split in ("train", "heldout") for entry in manifest[split])
    size = source_size("prose", SourceConfig(path=f"{folder}/prose-*.parquet"))
    assert size.text_bytes == pytest.approx(text_bytes, rel=0.05)
    assert size.documents == sum(entry["rows"] for entry in manifest["inputs"])
    texts = [text for path in folder.glob("prose-*.parquet") for text in pq.read_table(path)["text"].to_pylist()]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert source_size("x", SourceConfig(path=str(tmp_path))).text_bytes == pytest.approx(text_bytes, rel=0.05)


def test_of_many_shards_a_part_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(100):
        pq.write_table(pa.table({"text": ["word " * 100] * 10}), tmp_path / f"{number:03d}.parquet")
    opened = []
    original = source_size.__globals__["open_shard"]
    monkeypatch.setattr(
        "yxanul_nemo.plan.source_sizes.open_shard", lambda shard, *rest: opened.append(shard) or original(shard, *rest)
    )
    size = source_size("x", SourceConfig(path=str(tmp_path)))
    assert (size.shards, size.documents) == (100, 1000)
    assert len(opened) < 50


def test_a_text_that_is_read_too_often_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a word or two\n" * 100)
    config = settings_of(tmp_path, "recipe=yxanul_197m_ultra", f"data.sources.text.path={tmp_path}")
    assert "more often than data.max_epochs=4" in found(config)["data text"].found


def test_plan_begins_with_the_needs_and_keeps_them(
    complete: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    config = complete("data.sources.text.path=/absent")
    plan = run_plan_stage(config)
    printed = capsys.readouterr().out
    assert printed.index("/absent does not exist") < printed.index("parameters")
    kept = json.loads((config.run.dir / "plan.json").read_text())["needs"]
    assert [need["what"] for need in kept] == [need.what for need in plan.needs]


def test_the_disk_for_tokens_is_what_they_take(
    prepared: Path, make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """For token ids of two bytes, from the text of a corpus that is prepared elsewhere."""
    config = make_config(
        f"run.dir={tmp_path}",
        "data=parquet",
        f"data.sources.text.path={prepared}/data/corpus/*.parquet",
        "validation=multi_domain",
    )
    written = sum(path.stat().st_size for path in prepared.glob("data/*/*/*.bin"))
    estimate = preflight.tokens_bytes_to_come(config, Tokenizer.load(prepared / "tokenizer").vocab_size)
    assert written / 2 < estimate < written * 2


@pytest.mark.parametrize("stage", ["generate", "validate", "evaluate", "import"])
def test_a_model_that_does_not_exist_is_refused_before_heavy_imports(tmp_path: Path, stage: str) -> None:
    """`sys.modules` tells what was imported; seconds depend on the machine."""
    program = (
        "import sys\nfrom yxanul_nemo.launch import command as launcher\n"
        "try:\n    launcher.main()\n"
        "except SystemExit as end:\n    print(end.code, [name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, f"stage={stage}", "from=nowhere", f"run.dir={tmp_path}"],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.stdout.split("\n")[0] == "2 []", done.stdout + done.stderr
    assert "from: nowhere does not exist; expected the folder of a run" in done.stderr
