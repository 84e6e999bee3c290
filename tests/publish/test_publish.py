"""An export on the hub: whole and in one commit, with a card that says what the run's files say, or nothing at all."""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from tests.fetch.hub_server import HubServer, card_problems, front_matter
from tests.publish.conftest import NAME
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.json_files import parse_json
from yxanul_nemo.launch.stages import run_stages
from yxanul_nemo.publish.card import publication_card
from yxanul_nemo.publish.publication import read_publication
from yxanul_nemo.validation.record import find_result


def changed(config: RunConfig, **publish: Any) -> RunConfig:
    return config.model_copy(update={"publish": config.publish.model_copy(update=publish)})


def export_files(config: RunConfig) -> dict[str, bytes]:
    """What the repository should hold, without the card."""
    folder = config.run.folder.export
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    kept = {name.removeprefix("hf/"): path for name, path in paths.items() if name != "export.json"}
    return {name: path.read_bytes() for name, path in kept.items() if name != "README.md"}


def test_one_commit_has_all_files_and_a_repetition_makes_no_other(run: RunConfig, writable: HubServer) -> None:
    run_stages(run)
    repo = writable.repos[NAME]
    files = dict(repo.files)
    card = files.pop("README.md").decode()
    del files[".gitattributes"]
    assert files == export_files(run)
    assert len(repo.commits) == 1
    assert card_problems(card) == []
    run_stages(run)
    assert len(repo.commits) == 1


def test_a_branch_leaves_main_and_older_formats_do_not_stay(run: RunConfig, writable: HubServer) -> None:
    writable.add(NAME, {"model.gguf": b"of an older export", "README.md": b"---\ntags:\n- yxanul\n---\n"}, "model")
    run_stages(changed(run, revision="phase-1"))
    repo = writable.repos[NAME]
    assert set(repo.files) == {"model.gguf", "README.md"}
    assert set(repo.branches["phase-1"]) == {"README.md", *export_files(run)}


def test_the_card_says_what_the_runs_files_say(run: RunConfig) -> None:
    publication = read_publication(run.run.dir)
    card = str(publication_card(publication, NAME))
    ledger, result = publication.ledger, find_result(run, publication.checkpoint)
    assert result is not None
    for name, tokens in ledger.tokens_per_source.items():
        row = next(line for line in card.splitlines() if line.startswith(f"| {name} | documentation"))
        assert f" {tokens:,} " in row
    for name, data in export_files(run).items():
        assert f"| SHA-256 of `{name}` | `{hashlib.sha256(data).hexdigest()}` |" in card
    shown = {
        entry["dataset"]["type"]: entry["metrics"][0]["value"]
        for entry in front_matter(card)["model-index"][0]["results"]
    }
    assert shown == {name: round(score["bits_per_byte"], 4) for name, score in result["domains"].items()}
    for name, score in result["domains"].items():
        row = next(line for line in card.splitlines() if line.startswith(f"| {name} | {score['documents']} |"))
        interval, error = row.split(" | ")[3], score["bits_per_byte_standard_error"]
        if error == 0:
            assert interval == "-"
        else:
            low, high = map(float, interval.split(" to "))
            assert (low + high) / 2 == pytest.approx(score["bits_per_byte"], abs=1e-4)
            assert high - low == pytest.approx(2 * 1.96 * error, abs=2e-4)
    assert f'from_pretrained("{NAME}")' in card
    assert publication.checkpoint.manifest.digest in card and ledger.corpus_fingerprint in card
    parity = parse_json(run.run.folder.export_record.read_text())["parity"]
    assert all(f"| {name} | {of['max_logit_difference']:.2g} |" in card for name, of in parity.items())
    for private in (run.run.dir, run.data_dir):
        assert str(private) not in card


def test_a_dry_run_shows_all_without_network_or_token(
    run: RunConfig, writable: HubServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    run_stages(changed(run, dry_run=True))
    assert writable.requests == [] and writable.repos == {}
    told = capsys.readouterr().out
    assert str(publication_card(read_publication(run.run.dir), NAME)) in told
    assert all(name in told for name in export_files(run))


def test_an_upload_that_fails_publishes_nothing(run: RunConfig, writable: HubServer) -> None:
    writable.failing["upload"] = 403
    with pytest.raises(UserError):
        run_stages(run)
    assert set(writable.repos[NAME].files) == {".gitattributes"}
    writable.failing.clear()
    run_stages(run)
    assert len(writable.repos[NAME].commits) == 1


def test_mistakes_are_told_before_anything_is_made(
    run: RunConfig, writable: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"publish\.repo: is not set"):
        run_stages(changed(run, repo=None))
    with pytest.raises(UserError, match="Cannot have -- or"):
        run_stages(changed(run, repo="me/a--b"))
    card = run.run.folder.export / "hf" / "README.md"
    text = card.read_text()
    card.write_text(text.replace("license: apache-2.0", "license: my-own"))
    with pytest.raises(UserError, match=r"the model card: is not taken by the hub.*license"):
        run_stages(run)
    card.write_text(text)
    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    with pytest.raises(UserError, match=r"no right to write there.*HF_TOKEN"):
        run_stages(run)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="there is no token"):
        run_stages(run)
    assert writable.repos == {}
    monkeypatch.setenv("HF_TOKEN", str(writable.writer))
    writable.add(NAME, {"config.json": b"{}", "README.md": b"---\ntags: [other]\n---\n"}, "model")
    with pytest.raises(UserError, match=r"holds something else \(config\.json\)"):
        run_stages(run)
    assert writable.repos[NAME].commits == []
    writable.stop()
    with pytest.raises(UserError, match="does not answer"):
        run_stages(run)


def test_only_a_whole_export_of_a_kept_checkpoint_is_published(run: RunConfig, tmp_path: Path) -> None:
    dry = changed(run, dry_run=True)
    record = run.run.folder.export_record
    weights = run.run.folder.export / "hf" / "model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(UserError, match=r"model\.safetensors: is not the file that was exported"):
        run_stages(dry)
    weights.write_bytes(kept)
    run.run.folder.checkpoints.rename(tmp_path / "away")
    with pytest.raises(UserError, match="not kept any more"):
        run_stages(dry)
    record.unlink()
    with pytest.raises(UserError, match=r"has no export.*stage=export"):
        run_stages(dry)
