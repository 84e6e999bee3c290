"""The benchmark: which cases are measured, and that what is timed is training."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.ranks import run_ranks
from yxanul_nemo.bench.cases import Case, bench_cases, bench_sweeps, distinct_cases
from yxanul_nemo.bench.figures import curriculum_speeds
from yxanul_nemo.bench.measure import Result, measure
from yxanul_nemo.bench.stage import RANDOM_DOCUMENT_TOKENS, RandomTokens, run_bench_stage
from yxanul_nemo.config.load import compose, parse
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.curriculum.phases import plan_phases
from yxanul_nemo.errors import UserError


def test_the_phases_of_a_curriculum_are_measured_with_their_own_steps() -> None:
    config = parse(compose(["recipe=yxanul_197m_h100", "parallel.micro_batch_tokens=65536"]))
    cases = bench_cases(config, [config.precision.name])
    assert [case.phase.seq_len for case in cases] == [phase.seq_len for phase in config.curriculum.phases]
    for case, phase in zip(cases, config.curriculum.phases, strict=True):
        assert case.micro_batch_tokens * case.accumulation == phase.tokens_per_step
        assert case.micro_batch_tokens <= config.parallel.micro_batch_tokens


def test_lists_are_tried_in_every_combination() -> None:
    asked = ("bench.seq_len=[8,100,2048]", "bench.precision=[bf16,fp8_hybrid]", "bench.micro_batch_tokens=[8192,16384]")
    cases = bench_cases(parse(compose(["recipe=yxanul_197m_h100", *asked])), ["fp8_hybrid"])
    assert len(cases) == 12 == len({case.name for case in cases})
    for case in cases:
        assert case.phase.tokens_per_step % case.phase.seq_len == 0
        assert case.accumulation * case.micro_batch_tokens == case.phase.tokens_per_step
        assert case.micro_batch_tokens % case.precision.token_multiple == 0


def test_a_length_without_positions_is_refused() -> None:
    with pytest.raises(UserError, match=r"bench\.seq_len: has 9000"):
        asked = ("parallel.micro_batch_tokens=65536", "bench.seq_len=[9000]")
        bench_cases(parse(compose(["recipe=yxanul_197m_h100", *asked])), ["fp8_hybrid"])


def test_the_figures_are_those_of_training_steps(
    prepared: Path, make_config: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("bench.seq_len=[16,64]", "bench.tokens_per_step=512", "bench.steps=6", "bench.profile=true")
    config = make_config(f"run.dir={prepared}", *asked)
    assert run_bench_stage(config)
    (path,) = (prepared / "bench").glob("*.json")
    report = json.loads(path.read_text())
    assert report["data"] == f"the corpus in {prepared / 'data'}"
    assert [case["seq_len"] for case in report["cases"]] == [16, 64]
    for case in report["cases"]:
        assert case["tokens_per_second"] == pytest.approx(case["tokens_per_step"] / case["step_seconds_median"])
        # The logarithm of 700 ids is 6.55; ten steps of training have begun to lower it.
        assert 4 < case["loss_nats_per_token"] < 6.6
        assert case["kernels"][0]["seconds"] > 0
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "tokens/s" in capsys.readouterr().out


def test_the_speed_over_the_curriculum_is_all_its_tokens_over_all_its_seconds(
    tmp_path: Path, make_config: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(f"run.dir={tmp_path}", "bench.steps=2", "bench.warmup_steps=1")
    assert run_bench_stage(config)
    (path,) = (tmp_path / "bench").glob("*.json")
    report = json.loads(path.read_text())
    rate_of = {(case["seq_len"], case["tokens_per_step"]): case["tokens_per_second"] for case in report["cases"]}
    phases = plan_phases(config.curriculum)
    seconds = sum(phase.tokens / rate_of[phase.seq_len, phase.tokens_per_step] for phase in phases)
    (speed,) = report["curriculum"]
    assert speed["tokens"] == sum(phase.tokens for phase in phases)
    assert speed["step_seconds"] == pytest.approx(seconds)
    assert min(rate_of.values()) <= speed["tokens_per_second"] <= max(rate_of.values())
    assert f"{speed['tokens_per_second']:,.0f} tokens/s over" in capsys.readouterr().out


def test_a_curriculum_with_a_phase_that_failed_has_no_speed() -> None:
    config = parse(compose(["recipe=yxanul_197m_h100", "parallel.micro_batch_tokens=65536"]))
    sweeps = bench_sweeps(config, ["bf16", "fp8_hybrid"])
    rates = {case.shape: 1e5 for case in distinct_cases(sweeps) if case.shape[:3:2] != (2048, "bf16")}
    assert len(rates) == len(distinct_cases(sweeps)) - 1
    (speed,) = curriculum_speeds(sweeps, rates)
    assert speed["precision"] == "fp8_hybrid" and speed["tokens_per_second"] == pytest.approx(1e5)


def test_cases_that_were_measured_are_kept_when_a_later_one_breaks(
    tmp_path: Path, make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks_at_32(config: RunConfig, case: Case, *others: object) -> Result:
        if case.phase.seq_len == 32:
            raise KeyboardInterrupt
        return measure(config, case, *others)

    monkeypatch.setattr("yxanul_nemo.bench.stage.measure", breaks_at_32)
    asked = ("bench.seq_len=[16,32]", "bench.tokens_per_step=256", "bench.steps=2", "bench.warmup_steps=1")
    with pytest.raises(KeyboardInterrupt):
        run_bench_stage(make_config(f"run.dir={tmp_path}", *asked))
    (path,) = (tmp_path / "bench").glob("*.json")
    assert [case["seq_len"] for case in json.loads(path.read_text())["cases"]] == [16]


def test_processes_of_torchrun_share_the_steps(
    prepared: Path, make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    asked = ("bench.seq_len=[16]", "bench.tokens_per_step=512", "bench.steps=2", "bench.warmup_steps=1")
    config = make_config(f"run.dir={tmp_path}", f"data.dir={prepared / 'data'}", *asked)
    assert run_ranks(run_bench_stage, 2, config) == [True, True]
    (path,) = (tmp_path / "bench").glob("*.json")
    report = json.loads(path.read_text())
    assert report["processes"] == 2
    (case,) = report["cases"]
    assert 16 * case["micro_batch_size"] * case["accumulation"] * 2 == case["tokens_per_step"] == 512
    assert case["tokens_per_second"] == pytest.approx(512 / case["step_seconds_median"])


def test_without_a_corpus_random_tokens_are_used_and_said(
    tmp_path: Path, make_config: Callable[..., RunConfig]
) -> None:
    config = make_config(f"run.dir={tmp_path}", "bench.seq_len=[16]", "bench.tokens_per_step=256", "bench.steps=2")
    assert run_bench_stage(config)
    (path,) = (tmp_path / "bench").glob("*.json")
    assert "random tokens" in json.loads(path.read_text())["data"]


def test_random_tokens_have_documents_that_attention_can_be_kept_inside(
    tmp_path: Path, make_config: Callable[..., RunConfig]
) -> None:
    tokens = RandomTokens(200_005, 0, seed=1).tokens[:400_000]
    assert 400_000 / np.count_nonzero(tokens == 0) == pytest.approx(RANDOM_DOCUMENT_TOKENS, rel=0.1)
    asked = ("bench.seq_len=[128]", "bench.tokens_per_step=2048", "bench.steps=2", "data.document_mask=true")
    assert run_bench_stage(make_config(f"run.dir={tmp_path}", *asked))
    (path,) = (tmp_path / "bench").glob("*.json")
    report = json.loads(path.read_text())
    assert report["document_mask"] is True and "documents of 588 on average" in report["data"]
    assert 6 < report["cases"][0]["loss_nats_per_token"] < 7
