"""Records of training: means over applied steps, and a file in which each record stands once. Lightning is imported in children."""

import json
import math
from pathlib import Path

import pytest

from tests.ranks import run_ranks


def meter_records(steps: list[tuple[float, float, bool]], record_after: list[int]) -> list[tuple[dict, int, int]]:
    """Records after those steps of (loss, gradient norm, applied), each with the meter's two counts of skipped steps."""
    import torch

    from yxanul_nemo.training.metrics import StepMeter

    meter = StepMeter(bytes_per_token=4.0, flops_per_token=10.0)
    records = []
    for number, (loss, norm, applied) in enumerate(steps, start=1):
        meter.add(100, torch.tensor(loss, dtype=torch.float64), torch.tensor(norm), torch.tensor(applied))
        if number in record_after:
            records.append((meter.record(), meter.skipped, meter.skipped_in_a_row))
    return records


def paused_record(monotonic_seconds: list[float], pause_seconds: float) -> dict:
    """A record of one step of 100 tokens with a pause for a checkpoint in the interval, by a clock that shows those times."""
    import torch

    from yxanul_nemo.training import metrics

    clock = iter(monotonic_seconds)
    metrics.time.perf_counter = lambda: next(clock)
    meter = metrics.StepMeter(4.0, 10.0)
    meter.pause(pause_seconds)
    meter.add(100, torch.tensor(1.0), torch.tensor(1.0), torch.tensor(True))
    return meter.record()


def log(run_dir: Path, resume_tokens: int, tokens: list[int], value: float = 1.0) -> str:
    """The file's text after a logger that resumes there has logged records at those tokens."""
    from yxanul_nemo.training.sinks import JsonlLogger

    logger = JsonlLogger(run_dir, resume_tokens)
    for total in tokens:
        logger.log_metrics({"value": value}, step=total)
    return logger.path.read_text()


def write(run_dir: Path, tokens: list[int], torn: str = "") -> None:
    """The file as a run that crashed has left it."""
    lines = [f'{{"tokens_total": {total}, "value": 1.0}}\n' for total in tokens]
    (run_dir / "metrics.jsonl").write_text("".join(lines) + torn)


def totals(text: str) -> list[int]:
    return [json.loads(line)["tokens_total"] for line in text.splitlines()]


def test_records_are_means_over_the_steps_since_the_last_one() -> None:
    steps = [(2.0, 0.5, True), (4.0, 0.7, True), (8.0, 0.9, True)]
    (first, *_), (second, *_) = run_ranks(meter_records, 1, steps, [2, 3])[0]
    assert first["loss_nats_per_token"] == 3.0 and second["loss_nats_per_token"] == 8.0
    assert first["bits_per_byte"] == pytest.approx(3.0 / math.log(2) / 4.0)
    assert (first["steps"], second["steps"]) == (2, 1)
    assert first["grad_norm"] == pytest.approx(0.7)
    for record in (first, second):
        tokens = 100 * record["steps"]
        assert record["tokens_per_second"] == pytest.approx(tokens / (record["seconds_per_step"] * record["steps"]))
        assert record["model_flops_per_second"] == pytest.approx(10 * record["tokens_per_second"])


def test_skipped_steps_are_counted_and_hide_no_loss() -> None:
    nan = math.nan
    steps = [(2.0, 1.0, True), (nan, nan, False), (nan, math.inf, False), (4.0, 1.0, True), (nan, nan, False)]
    (first, *first_counts), (second, *second_counts) = run_ranks(meter_records, 1, steps, [3, 5])[0]
    assert first["loss_nats_per_token"] == 2.0 and second["loss_nats_per_token"] == 4.0
    assert (first["skipped_steps"], second["skipped_steps"]) == (2, 1)
    assert first_counts == [2, 2] and second_counts == [3, 1]


def test_an_interval_of_skipped_steps_has_no_loss() -> None:
    ((record, *_),) = run_ranks(meter_records, 1, [(math.nan, math.inf, False)], [1])[0]
    assert math.isnan(record["loss_nats_per_token"]) and record["skipped_steps"] == record["steps"] == 1


def test_waiting_for_a_checkpoint_is_recorded_apart_from_speed() -> None:
    record = run_ranks(paused_record, 1, [10.0, 20.0, 20.0], 8.0)[0]
    assert record["save_wait_seconds"] == 8.0 and record["save_seconds"] == 0.0
    assert record["seconds_per_step"] == 2.0 and record["tokens_per_second"] == 50.0


def test_records_are_lines_of_json_without_nan(tmp_path: Path) -> None:
    text = run_ranks(log, 1, tmp_path, 0, [10, 20], math.inf)[0]
    assert text == '{"tokens_total": 10, "value": null}\n{"tokens_total": 20, "value": null}\n'


def test_resuming_drops_what_is_trained_again_and_goes_on(tmp_path: Path) -> None:
    write(tmp_path, [10, 20, 30, 40])
    assert totals(run_ranks(log, 1, tmp_path, 20, [30])[0]) == [10, 20, 30]
    assert totals(run_ranks(log, 1, tmp_path, 30, [40])[0]) == [10, 20, 30, 40]


@pytest.mark.parametrize(
    "torn", ['{"tokens_total": 30, "val', '{"tokens_total": 30, "value": 1.0}', "\x00\x00\x00", "[1]\n"]
)
def test_what_a_crash_has_left_of_a_line_spoils_no_other(tmp_path: Path, torn: str) -> None:
    write(tmp_path, [10, 20], torn)
    assert totals(run_ranks(log, 1, tmp_path, 40, [50])[0]) == [10, 20, 50]


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(AssertionError, match=r"UserError: .*metrics\.jsonl: is a folder; expected a plain file"):
        run_ranks(log, 1, tmp_path, 0, [10])
