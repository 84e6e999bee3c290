"""A record's figures against sums made by hand, and the line that people read."""

from types import SimpleNamespace

import pytest

from tests.ranks import run_ranks


def records_of(devices_peak: float | None, speeds: list[float]) -> tuple[list[dict], list[tuple[str, dict]]]:
    """What sinks get, and what is shown, of one step of the second of three phases per record, at those speeds in tokens/s."""
    from yxanul_nemo.config.curriculum import CurriculumConfig
    from yxanul_nemo.curriculum.phases import plan_phases
    from yxanul_nemo.training.records import Recorder

    lengths = [{"tokens": 1000, "seq_len": length, "tokens_per_step": 100} for length in (1, 2, 4)]
    phases = plan_phases(CurriculumConfig.model_validate({"name": "x", "phases": lengths}))
    logged: list[dict] = []
    shown: list[tuple[str, dict]] = []
    sink = SimpleNamespace(log_metrics=lambda record, step: logged.append(dict(record) | {"step": step}))
    recorder = Recorder(
        phases, [10.0, 20.0, 40.0], "cpu", devices_peak, lambda line, progress: shown.append((line, dict(progress)))
    )
    for steps, speed in enumerate(speeds, start=1):
        figures = {
            "loss_nats_per_token": 5.0, "bits_per_byte": 2.0, "grad_norm": 0.5, "skipped_steps": steps - 1,
            "tokens_per_second": speed, "model_flops_per_second": speed * 20.0,
        }  # fmt: skip
        state = SimpleNamespace(
            meter=SimpleNamespace(record=lambda figures=figures: dict(figures), skipped_updates=[]),
            phase=phases[1], steps_done=steps, last_lr=1e-3, tokens_total=1000 + steps * 100, loggers=[sink], callback_metrics={},
        )  # fmt: skip
        recorder.record(state)
    return logged, shown


def test_time_left_goes_by_the_flops_that_are_left() -> None:
    _, shown = run_ranks(records_of, 1, None, [50.0, 100.0])[0]
    # 900 tokens of this phase and 1000 of the next, which costs twice as much each.
    assert shown[0][1]["phase_seconds_left"] == pytest.approx(900 / 50)
    assert shown[0][1]["run_seconds_left"] == pytest.approx(900 / 50 + 2000 / 50)
    speed = 0.7 * 50 + 0.3 * 100
    assert shown[1][1]["phase_seconds_left"] == pytest.approx(800 / speed)
    assert "left 0:18, run 0:58" in shown[0][0] and "phase 2/3" in shown[0][0] and "step     1/10" in shown[0][0]
    assert "skipped" not in shown[0][0] and "1 skipped" in shown[1][0]


def test_mfu_is_of_the_stated_peak_and_absent_without_one() -> None:
    logged, shown = run_ranks(records_of, 1, 4000.0, [50.0])[0]
    assert logged[0]["mfu"] == 1000 / 4000 and logged[0]["mfu_peak_flops_per_second"] == 4000
    assert "mfu 25.0%" in shown[0][0]
    logged, shown = run_ranks(records_of, 1, None, [50.0])[0]
    assert "mfu" not in logged[0] and "mfu" not in shown[0][0]


def test_sinks_get_the_record_at_its_tokens_and_nothing_of_the_display() -> None:
    logged, _ = run_ranks(records_of, 1, None, [50.0, 50.0])[0]
    assert [record["step"] for record in logged] == [1100, 1200]
    for record in logged:
        assert (record["phase"], record["seq_len"], record["learning_rate"]) == (2, 2, 1e-3)
        assert record["peak_memory_bytes"] > 100 << 20, "torch alone takes as much"
        assert not any(name.endswith("_left") for name in record)
