"""Checkpoints by somebody else, who made the digests fit: read or refused, never a crash, a hang or a full memory."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.export.conftest import MakeRun
from tests.hostile import attempt, changed, damaged
from yxanul_nemo.checkpoint.manifest import MANIFEST_NAME, FileEntry, Manifest, read_manifest
from yxanul_nemo.checkpoint.snapshot import HEADER_KEY
from yxanul_nemo.config.load import load_run_config
from yxanul_nemo.export.source import load_source
from yxanul_nemo.files import fingerprint, sha256_file

FUZZ = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
RANK = "rank_00000.safetensors"


@pytest.fixture(scope="module")
def good(make_run: MakeRun) -> Path:
    """A run's folder with one checkpoint."""
    config, _ = make_run()
    assert load_source(config.run.dir, device="cpu").context_tokens == 128
    return config.run.dir


def forged(good: Path, box: Path, change: Callable[[Path], object]) -> Path:
    """The run with its checkpoint changed and signed again, as an attacker would."""
    run = box / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "tokenizer").symlink_to(good / "tokenizer")
    source = next((good / "checkpoints").glob("tokens_*"))
    folder = shutil.copytree(source, run / "checkpoints" / source.name)
    old, place = read_manifest(folder), folder / MANIFEST_NAME
    written = place.stat().st_ino, place.stat().st_mtime_ns
    change(folder)
    found = [file for file in sorted(folder.iterdir()) if file.is_file() and file.name != MANIFEST_NAME]
    files = {file.name: FileEntry(size_bytes=file.stat().st_size, sha256=sha256_file(file)) for file in found}
    if "ledger.json" in files and (place.stat().st_ino, place.stat().st_mtime_ns) == written:
        place.write_text(Manifest(**dict(old) | {"files": files}).to_text())
    return run


def try_run(box: Path, run: Path) -> str:
    folder = next((run / "checkpoints").glob("tokens_*"))
    return attempt("checkpoint", box, lambda: load_source(folder, device="cpu"))


def tensors(change: Callable[[dict[str, torch.Tensor], dict], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        found = load_file(folder / RANK)
        length = int.from_bytes((folder / RANK).read_bytes()[:8], "little")
        told = json.loads((folder / RANK).read_bytes()[8 : 8 + length])["__metadata__"]
        places = json.loads(told[HEADER_KEY])
        change(found, places)
        save_file(found, folder / RANK, metadata={HEADER_KEY: json.dumps(places)})

    return apply


def weight(found: dict[str, torch.Tensor]) -> str:
    return next(name for name in found if name.startswith("model.") and name.endswith("@0") and found[name].dim() == 1)


def described(**model: object) -> Callable[[Path], None]:
    """Another model in config.yaml, and the ledger's fingerprint of it."""

    def apply(folder: Path) -> None:
        plain = yaml.safe_load((folder / "config.yaml").read_text())
        plain["model"] |= model
        (folder / "config.yaml").write_text(yaml.safe_dump(plain))
        shape = load_run_config(folder / "config.yaml").model.model_dump()
        ledger = json.loads((folder / "ledger.json").read_text())
        ledger["model_fingerprint"] = fingerprint({"model": shape, "vocab_size": 700})
        (folder / "ledger.json").write_text(json.dumps(ledger))

    return apply


def ledger(**changes: object) -> Callable[[Path], None]:
    return lambda f: (f / "ledger.json").write_text(json.dumps(json.loads((f / "ledger.json").read_text()) | changes))


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content)


def replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    return lambda folder: ((folder / name).unlink(), make(folder / name))


FORGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "NaN": (tensors(lambda w, _: w[weight(w)].fill_(torch.nan)), "that are NaN or infinite"),
    "integers": (tensors(lambda w, _: w.update({weight(w): w[weight(w)].long()})), "as torch.int64"),
    "a tensor outside of itself": (tensors(lambda w, p: p[weight(w)].update(offset=[10**9])), "lies outside"),
    "a tensor before itself": (tensors(lambda w, p: p[weight(w)].update(offset=[-1])), "is not a checkpoint file"),
    "a tensor of another shape": (tensors(lambda w, p: p[weight(w)].update(global_shape=[10**12])), "has 'model"),
    "a place of nothing": (tensors(lambda _, p: p.update(nothing={"offset": [0], "global_shape": [1]})), "is not a checkpoint file"),
    "places that are a list": (tensors(lambda _, p: p.clear()), "holds no|is not a checkpoint|lacks"),
    "a wide model": (described(hidden_size=2**17), "numbers of a model; expected"),
    "a deep model": (described(num_layers=1024), "numbers of a model; expected"),
    "a small model": (described(num_layers=1), "has 'model|lacks the tensor|as the configured model has it"),
    "another model": (lambda f: described(num_layers=3)(f) or ledger(model_fingerprint="0" * 64)(f), "is of another model"),
    "tokens below none": (ledger(tokens_total=-1), "tokens_total"),
    "tokens of another sum": (ledger(tokens_total=10**9), "tokens_total"),
    "a ledger of another version": (ledger(format_version=2), "format_version"),
    "a ledger of another key": (ledger(evil="x"), "evil"),
    "another tokenizer": (ledger(tokenizer_fingerprint="0" * 64), "is not the tokenizer"),
    "a ledger of nothing": (text("ledger.json", ""), "ledger.json"),
    "a deep ledger": (text("ledger.json", "[" * 100_000), "ledger.json"),
    "a configuration of nothing": (text("config.yaml", ""), "config.yaml"),
    "a tag": (text("config.yaml", "run: !!python/object/apply:os.system [id]\n"), "YAML tag"),
    "anchors": (text("config.yaml", "a: &x [1]\nb: *x\n"), "YAML anchors"),
    "a configuration over all bounds": (text("config.yaml", "#" * 300_000), "more than 262,144 bytes"),
    "no configuration": (lambda f: (f / "config.yaml").unlink(), "config.yaml: not found"),
    "no ledger": (lambda f: (f / "ledger.json").unlink(), "ledger.json"),
    "no weights": (lambda f: (f / RANK).unlink(), "holds no rank_"),
    "weights of nothing": (text(RANK, ""), "is not a checkpoint file"),
    "a pickle for weights": (lambda f: torch.save({"x": torch.zeros(1)}, f / RANK), "is not a checkpoint file"),
    "a link for weights": (replaced(RANK, lambda p: p.symlink_to("/etc/passwd")), RANK),
    "a link for a ledger": (replaced("ledger.json", lambda p: p.symlink_to("/dev/zero")), "ledger.json"),
    "a pipe for a ledger": (replaced("ledger.json", os.mkfifo), "ledger.json"),
    "a pipe for a configuration": (replaced("config.yaml", os.mkfifo), "config.yaml"),
    "a pipe for a manifest": (replaced(MANIFEST_NAME, os.mkfifo), "is no complete checkpoint"),
    "a manifest of nothing": (text(MANIFEST_NAME, ""), "is no complete checkpoint"),
    "a deep manifest": (text(MANIFEST_NAME, "[" * 100_000), "is no complete checkpoint"),
    "a folder for weights": (replaced(RANK, Path.mkdir), RANK),
}  # fmt: skip


@pytest.mark.parametrize("what", FORGED)
def test_a_forged_checkpoint_is_refused(good: Path, tmp_path: Path, what: str) -> None:
    change, message = FORGED[what]
    refusal = try_run(tmp_path, forged(good, tmp_path, change))
    assert re.search(message, refusal), refusal


def test_a_forged_configuration_looks_nothing_up(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YXANUL_TEST_SECRET", "s3cret")

    def change(folder: Path) -> None:
        plain = yaml.safe_load((folder / "config.yaml").read_text())
        plain["run"]["name"] = "${oc.env:YXANUL_TEST_SECRET}"
        (folder / "config.yaml").write_text(yaml.safe_dump(plain))

    run = forged(good, tmp_path, change)
    assert try_run(tmp_path, run) == ""
    config = load_run_config(next((run / "checkpoints").glob("tokens_*")) / "config.yaml")
    assert config.run.name == "${oc.env:YXANUL_TEST_SECRET}"


@given(data=st.data(), name=st.sampled_from(["config.yaml", "ledger.json", RANK]))
@FUZZ
def test_changed_checkpoints_are_read_or_refused(
    good: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, name: str
) -> None:
    def change(folder: Path) -> None:
        path = folder / name
        match name:
            case "config.yaml":
                path.write_text(yaml.safe_dump(data.draw(changed(yaml.safe_load(path.read_text())))))
            case "ledger.json":
                path.write_text(json.dumps(data.draw(changed(json.loads(path.read_text())))))
            case _:
                path.write_bytes(data.draw(damaged(path.read_bytes(), 8000)))

    box = tmp_path_factory.mktemp("made")
    try_run(box, forged(good, box, change))
