"""Pages about runs: complete, self-contained, true to the files they are made from, also where a run has only begun."""

import base64
import json
import math
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from data_prep.corpus.manifest import load_manifest
from yxanul_nemo.checkpoint.identity import expected_run, phase_plan
from yxanul_nemo.checkpoint.ledger import Ledger
from yxanul_nemo.checkpoint.store import CheckpointStore
from yxanul_nemo.config.load import to_yaml
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.curriculum.phases import plan_phases
from yxanul_nemo.errors import UserError
from yxanul_nemo.report.charts import smoothed
from yxanul_nemo.report.comparison import distinct_labels
from yxanul_nemo.report.gather import read_run
from yxanul_nemo.report.samples import SAMPLES_NAME, Sample, read_or_make_samples
from yxanul_nemo.report.single import trained_formats
from yxanul_nemo.report.stage import run_report_stage
from yxanul_nemo.report.style import MAX_POINTS, thinned

HOSTILE = "<script>alert('1')</script> & \"more\""
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """A page taken apart: its words, pictures and everything that a browser would fetch."""

    def __init__(self, path: Path):
        super().__init__()
        self.words: list[str] = []
        self.pictures: list[bytes] = []
        self.fetched: list[str] = []
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "img":
            kind, _, data = (values["src"] or "").partition(";base64,")
            assert kind == "data:image/svg+xml" and values["alt"]
            self.pictures.append(base64.b64decode(data, validate=True))
        elif tag in ("script", "link", "iframe", "object") or "src" in values:
            self.fetched.append(tag)
        if tag == "a":
            assert (values["href"] or "").startswith("#")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            assert "url(" not in data and "@import" not in data and "&#" not in data
            return
        self.words.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        """All words."""
        return " ".join("".join(self.words).split())


def commit(config: RunConfig, ledger: Ledger, phase_end: bool) -> None:
    store = CheckpointStore(config.run.dir / "checkpoints")
    temporary = store.begin(ledger.tokens_total)
    (temporary / "weights").write_bytes(b"w")
    store.commit(temporary, ledger, phase_end=phase_end)


@pytest.fixture
def make_run(prepared: Path, tmp_path: Path, make_config: Callable[..., RunConfig]) -> Callable[..., RunConfig]:
    """A run in the middle of its second phase, as training leaves it; no model is behind its checkpoints."""

    def make(name: str = "run", *overrides: str) -> RunConfig:
        run_dir = tmp_path / name
        shutil.copytree(prepared / "data", run_dir / "data")
        config = make_config(f"run.dir={run_dir}", *overrides)
        (run_dir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        phases = plan_phases(config.curriculum)
        ledger = Ledger.fresh(expected_run(config, load_manifest(run_dir / "data"), phases))
        first, second, _ = phases
        ledger = ledger.start_phase(phase_plan(first), 32, 1).consume(
            first.tokens, {"prose": first.tokens - 1024, "code": 1024}
        )
        commit(config, ledger, phase_end=True)
        half = second.tokens_per_step * (second.steps // 2)
        ledger = ledger.start_phase(phase_plan(second), 16, 1).consume(half, {"code": half}, skipped_steps=1)
        commit(config, ledger, phase_end=False)
        lines = []
        for phase, until in ((first, first.steps), (second, second.steps // 2)):
            for step in range(1, until + 1):
                tokens = phase.first_token + step * phase.tokens_per_step
                bad = phase is second and step == 2
                record = {
                    "tokens_total": tokens, "loss_nats_per_token": None if bad else 8 - tokens / 5000,
                    "bits_per_byte": None if bad else 3 - tokens / 9000, "grad_norm": None if bad else 0.8, "steps": 1,
                    "skipped_steps": int(bad), "tokens_per_second": 2000.0 * phase.number, "learning_rate": 1e-3,
                    "grad_clip": phase.grad_clip, "phase": phase.number, "mfu": 0.4, "mfu_peak_flops_per_second": 1e12,
                    "peak_memory_bytes": 1 << 30, "data_wait_share": 0.01, "time_unix": 1.79e9,
                }  # fmt: skip
                lines.append(json.dumps(record) + "\n")
        (run_dir / "metrics.jsonl").write_text("".join(lines) + '{"tokens_total": 99', encoding="utf-8")
        scores = {"documents": 3, "tokens": 100, "bits_per_byte_standard_error": 0.1, "perplexity": 20.0}
        domains = {"prose": scores | {"bits_per_byte": 2.0}, "code": scores | {"bits_per_byte": 4.0}}
        result = {
            "domains": domains,
            "mean_bits_per_byte": 3.0,
            "eval_len_tokens": 64,
            "stride_tokens": 32,
            "surprise_ratio_bits_per_byte": {"prose": 2 / 3, "code": 4 / 3},
        }
        (run_dir / "validation").mkdir()
        (run_dir / "validation" / "phase-01.json").write_text(json.dumps(result), encoding="utf-8")
        environment = {"command": "python launcher.py stage=all", "host": HOSTILE, "packages": {"torch": "1"}}
        (run_dir / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
        return config

    return make


def without_samples(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"report": config.report.model_copy(update={"prompts": []})})


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_under_way_has_a_page_that_needs_nothing_else(make_run: Callable[..., RunConfig]) -> None:
    config = make_run("run", f"run.description={json.dumps(HOSTILE)}")
    before = files_of(config.run.dir)
    path = run_report_stage(without_samples(config))
    after = files_of(config.run.dir)
    assert {name: data for name, data in after.items() if path.parent not in name.parents} == before
    assert path == config.run.dir / "report" / "index.html"
    page = Page(path)
    assert page.fetched == []
    for svg in page.pictures:
        assert ET.fromstring(svg).tag.endswith("svg")
    charts = {name.stem for name in path.parent.glob("*.png")}
    assert charts == {"loss", "speed", "gradients", "schedule", "validation", "sources"} and len(page.pictures) == len(
        charts
    )
    assert all(name.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") for name in path.parent.glob("*.png"))
    assert HOSTILE in page.text


def test_the_page_says_what_the_files_say(make_run: Callable[..., RunConfig]) -> None:
    config = make_run()
    page = Page(run_report_stage(without_samples(config)))
    first, second, third = plan_phases(config.curriculum)
    half = second.steps // 2
    done = first.tokens + half * second.tokens_per_step
    total = first.tokens + second.tokens + third.tokens
    assert f"phase 2 of 3, {done / total:.0%} of the tokens" in page.text
    assert f"1 of {first.steps + half} steps were skipped" in page.text
    rows = {row[0]: row for row in page.rows}
    plan = dict(zip(rows["phase"], rows["2 sentences"], strict=True))
    assert plan["seq len"] == str(second.seq_len) and plan["done"] == f"{half / second.steps:.0%}"
    assert rows["2 sentences"][5] == "4k" and plan["MFU"] == "40.0%"
    last = 8 - done / 5000
    assert plan["last loss"] == f"{last:.3f}" and plan["bits/byte held out"] == "-"
    assert rows["1 words in their nearest context"][-1] == "3.0000"
    assert rows["3 pages"][3] == "-"
    validated = next(row for row in page.rows if row[0] == "code" and "±" in "".join(row))
    assert validated[3:6] == ["4.0000 ± 0.1000", "20.00", "1.333"] and validated[6] == "more of its data"
    assert "python launcher.py stage=all" in page.text


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path, make_config: Callable[..., RunConfig]) -> None:
    config = make_config(f"run.dir={tmp_path}")
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    page = Page(run_report_stage(config))
    assert "not begun" in page.text and "Not validated yet" in page.text
    assert len(page.pictures) == 1, "the schedule is known before the first step"


def test_a_folder_without_a_run_is_a_mistake(tmp_path: Path, make_config: Callable[..., RunConfig]) -> None:
    with pytest.raises(UserError, match=r"config\.yaml: not found"):
        run_report_stage(make_config(f"run.dir={tmp_path}"))
    with pytest.raises(UserError, match="runs: names one run"):
        run_report_stage(make_config(f"runs=[{tmp_path}]"))
    assert list(tmp_path.iterdir()) == []


def test_missing_figures_are_gaps_and_not_zeros(make_run: Callable[..., RunConfig]) -> None:
    run = read_run(make_run().run.dir)
    assert np.isnan(run.records["loss_nats_per_token"]).sum() == 1
    assert np.isfinite(run.of_phase(2, "bits_per_byte")).all()
    assert run.median(2, "tokens_per_second") == 4000
    assert run.median(3, "tokens_per_second") is None


def test_runs_are_compared_by_what_differs(make_run: Callable[..., RunConfig], tmp_path: Path) -> None:
    one, other = make_run("one"), make_run("other", "optim.lr=1e-3", "curriculum.phases.2.lr_scale=0.5")
    (other.run.dir / "validation" / "phase-01.json").unlink()
    config = one.model_copy(update={"runs": [one.run.dir, other.run.dir]})
    path = run_report_stage(config)
    assert path.parent == tmp_path / "compare_one_other"
    page = Page(path)
    assert page.fetched == [] and len(page.pictures) == 3
    settings = page.rows[[row[0] for row in page.rows].index("key") + 1 :]
    assert settings == [["curriculum.phases.2.lr_scale", "1.0", "0.5"], ["optim.lr", "0.01", "0.001"]]
    assert ["prose", "2.0000 ± 0.1000", "-"] in page.rows


def test_labels_tell_runs_apart() -> None:
    assert distinct_labels([Path("/a/x"), Path("/a/y")]) == ["x", "y"]
    assert distinct_labels([Path("/a/x"), Path("/b/x"), Path("/b/z")]) == ["a-x", "b-x", "z"]


def test_samples_are_kept_while_checkpoint_and_settings_are_the_same(make_run: Callable[..., RunConfig]) -> None:
    config = make_run()
    folder = config.run.dir / "report"
    folder.mkdir()
    (end,) = [c for c in CheckpointStore(config.run.dir / "checkpoints").list() if c.phase_end]
    settings = config.report
    kept = [
        Sample(1, p, f"written {HOSTILE}", 7, end.manifest.digest, settings.sample_tokens, settings.temperature)
        for p in settings.prompts
    ]
    (folder / SAMPLES_NAME).write_text(json.dumps([asdict(sample) for sample in kept]), encoding="utf-8")
    # The checkpoint holds no model, so making one of them again would fail.
    assert read_or_make_samples(config.run.dir, folder, settings) == kept
    page = Page(run_report_stage(config))
    assert page.text.count(f"written {HOSTILE}") == 2
    for changed in ({"sample_tokens": 3}, {"temperature": 0.1}):
        assert not kept[0].is_for(end, kept[0].prompt, settings.model_copy(update=changed))
    assert not kept[0].is_for(end, "other", settings)


def test_smoothing_keeps_lines_and_does_not_lag() -> None:
    line = np.linspace(3.0, 9.0, 500)
    assert np.allclose(smoothed(line), line)
    noisy = line + np.random.default_rng(0).normal(0, 0.1, 500)
    assert np.abs(smoothed(noisy) - line)[5:-5].mean() < 0.5 * np.abs(noisy - line).mean()


def test_thinning_keeps_means_and_peaks() -> None:
    x = np.arange(10_000.0)
    y = np.sin(x)
    y[1234], y[50] = 7.0, math.nan
    few_x, means = thinned(x, y)
    assert len(few_x) == len(means) == MAX_POINTS and (np.diff(few_x) > 0).all()
    assert means.mean() == pytest.approx(np.nanmean(y), abs=0.01)
    assert thinned(x, y, keep_peaks=True)[1].max() == 7.0


def test_thetrained_formats_are_those_that_phases_were_trained_in(make_run: Callable[..., RunConfig]) -> None:
    run = read_run(make_run().run.dir)
    assert trained_formats(run) == "fp32"
    begun = run.ledger.with_precision("bf16")
    first = begun.phases[0].model_copy(update={"precision": "fp8_hybrid"})
    both = begun.model_copy(update={"phases": (first, *begun.phases[1:])})
    assert trained_formats(replace(run, ledger=both)) == "fp8_hybrid, bf16"


def test_results_at_tasks_are_on_the_page(make_run: Callable[..., RunConfig]) -> None:
    config = make_run()
    folder = config.run.folder.evaluation
    folder.mkdir()
    scored = {"questions": 1234, "chance": 0.25, "metrics": {"acc": {"value": 0.511, "standard_error": 0.038}}}
    tasks = {"cloze_prose": scored, "piqa": {"unavailable": HOSTILE}}
    result = {"model": "runs/x/checkpoints/y", "tasks": tasks, "accuracy_above_chance": 0.348}
    (folder / "x.json").write_text(json.dumps(result))
    # As version 0.1.0 wrote them.
    (folder / "old.json").write_text(json.dumps({"model": "z", "tasks": {}, "harness": {}}))
    rows = Page(run_report_stage(config)).rows
    assert ["cloze_prose", "acc", "1,234", "0.511 ± 0.038", "0.250"] in rows
    assert ["piqa", "-", "-", "not available", "-"] in rows
    assert ["mean above chance", "", "", "0.348", ""] in rows
