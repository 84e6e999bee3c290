"""Weights & Biases and MLflow without accounts: what is recorded stays here, one run over several phases, and no failure ends training."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.plan import needs

RECORDS = [(1024, 7.5), (2048, 7.0)]


def log_to_trackers(config: RunConfig, records: list[tuple[int, float]], environment: dict[str, str]) -> list[str]:
    """Log records to the configured trackers as one phase does; the warnings."""
    import logging

    from yxanul_nemo.training.trackers import make_trackers

    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        del os.environ[name]
    os.environ.update(environment)
    warnings: list[str] = []
    logger = logging.getLogger("yxanul")
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())
    logger.addHandler(handler)
    trackers = make_trackers(config)
    for tokens, loss in records:
        for tracker in trackers:
            tracker.log_metrics({"loss_nats_per_token": loss, "grad_norm": float("nan")}, step=tokens)
    for tracker in trackers:
        tracker.finalize("success")
    return warnings


def log_result(config: RunConfig, result: dict) -> dict[str, list[tuple[int, float]]]:
    """Log a validation; the scalars that TensorBoard has of it, by name, as (step, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from yxanul_nemo.training.sinks import log_validation

    log_validation(config, result)
    events = EventAccumulator(str(config.run.dir / "tensorboard"))
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def read_mlflow(uri: str, run_id: str) -> tuple[list[tuple[int, float]], dict[str, str]]:
    """The losses by step, and parameters, as MLflow's own client reads them."""
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    history = client.get_metric_history(run_id, "loss_nats_per_token")
    return [(metric.step, metric.value) for metric in history], client.get_run(run_id).data.params


def read_wandb(path: Path) -> list[tuple[int, float]]:
    """The losses by step in a file that W&B would send: LevelDB's log of protobuf records, behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    found, at = [], 7
    while at < len(data):
        _, length, kind = struct.unpack_from("<IHB", data, at)
        assert kind == 1, "records this small are whole"
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data[at + 7 : at + 7 + length])
        at += 7 + length
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            found.append((items["trainer/global_step"], items["loss_nats_per_token"]))
    return found


def test_mlflow_keeps_one_run_in_files_without_a_server(tmp_path: Path, make_config: Callable[..., RunConfig]) -> None:
    pytest.importorskip("mlflow", reason="needs `uv sync --extra mlflow`")
    config = make_config(f"run.dir={tmp_path}", "logging.mlflow=true")
    for record in RECORDS:
        assert run_ranks(log_to_trackers, 1, config, [record], {}) == [[]]
    run_id = (tmp_path / "trackers" / "mlflow_run_id").read_text()
    history, params = run_ranks(read_mlflow, 1, f"file:{tmp_path / 'trackers' / 'mlflow'}", run_id)[0]
    assert history == RECORDS
    assert params["optim/lr"] == "0.005"


def test_wandb_keeps_one_run_offline_without_an_account(tmp_path: Path, make_config: Callable[..., RunConfig]) -> None:
    config = make_config(f"run.dir={tmp_path}", "logging.wandb=true")
    home = {"HOME": str(tmp_path / "home")}
    for record in RECORDS:
        assert run_ranks(log_to_trackers, 1, config, [record], home) == [[]]
    run_id = (tmp_path / "trackers" / "wandb_run_id").read_text()
    files = sorted((tmp_path / "trackers" / "wandb").glob(f"offline-run-*-{run_id}/*.wandb"))
    assert [record for file in files for record in read_wandb(file)] == RECORDS


def test_a_validation_is_logged_at_its_tokens(tmp_path: Path, make_config: Callable[..., RunConfig]) -> None:
    result = {
        "tokens_total": 4096,
        "mean_bits_per_byte": 3.0,
        "domains": {"prose": {"bits_per_byte": 2.0}, "code": {"bits_per_byte": 4.0}},
        "surprise_ratio_bits_per_byte": {"prose": 0.5, "code": 1.5},
    }
    config = make_config(f"run.dir={tmp_path}", "logging.tensorboard=true")
    assert run_ranks(log_result, 1, config, result)[0] == {
        "validation/mean_bits_per_byte": [(4096, 3.0)],
        "validation/prose_bits_per_byte": [(4096, 2.0)],
        "validation/prose_surprise_ratio": [(4096, 0.5)],
        "validation/code_bits_per_byte": [(4096, 4.0)],
        "validation/code_surprise_ratio": [(4096, 1.5)],
    }


def test_a_tracker_that_cannot_be_reached_is_said_once_and_left_out(
    tmp_path: Path, make_config: Callable[..., RunConfig]
) -> None:
    pytest.importorskip("mlflow", reason="needs `uv sync --extra mlflow`")
    config = make_config(f"run.dir={tmp_path}", "logging.mlflow='http://127.0.0.1:9'")
    (warning,) = run_ranks(log_to_trackers, 1, config, RECORDS, {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"})[0]
    assert warning.startswith("MLflow failed (") and "training goes on without it" in warning


def test_a_package_that_is_missing_is_a_mistake_before_training(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(needs.importlib.util, "find_spec", lambda name: None)
    needs.check_trackers(make_config().logging)
    for key in ("wandb", "mlflow"):
        with pytest.raises(UserError, match=f"logging.{key}: .*uv sync --inexact --extra {key}"):
            needs.check_trackers(make_config(f"logging.{key}=true").logging)
