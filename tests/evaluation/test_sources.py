"""`stage=validate from=...`: the same figures from every source, and two models on the same documents."""

import json
import shutil
from pathlib import Path

import pytest

from data_prep.tokenizers.tokenizer import Tokenizer
from tests.export.conftest import MakeRun
from yxanul_nemo.checkpoint.committed import Checkpoint
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.launch.stages import run_stages
from yxanul_nemo.validation.record import find_result


def validated(config: RunConfig, into: Path, *sources: Path) -> dict:
    """What the stage writes to a run of its own, of which only data and tokenizer are the given one's."""
    into.mkdir(exist_ok=True)
    if not (into / "tokenizer").exists():
        (into / "tokenizer").symlink_to(config.run.dir / "tokenizer")
    run = config.run.model_copy(update={"dir": into})
    run_stages(config.model_copy(update={"run": run, "stage": "validate", "from_": [str(s) for s in sources]}))
    (written,) = (into / "validation" / "from").iterdir()
    result = json.loads(written.read_text())
    written.unlink()
    return result


def test_every_source_gives_the_figures_of_the_run(exported: tuple[RunConfig, Checkpoint], tmp_path: Path) -> None:
    config, checkpoint = exported
    expected = find_result(config, checkpoint)
    folder = config.run.dir / "export"
    for source in (config.run.dir, checkpoint.path, folder / "model.nemo", folder / "hf"):
        (model,) = validated(config, tmp_path / "run", source)["models"]
        for name, score in expected["domains"].items():
            assert model["domains"][name] == pytest.approx(score, rel=1e-5), source
        assert model["mean_bits_per_byte"] == pytest.approx(expected["mean_bits_per_byte"], rel=1e-5)


def test_two_models_are_compared_on_the_same_documents(
    exported: tuple[RunConfig, Checkpoint], make_run: MakeRun, tmp_path: Path
) -> None:
    from tests.export.conftest import commit_random_weights

    config, checkpoint = exported
    other, _ = make_run()
    worse = commit_random_weights(other, seed=5)
    result = validated(config, tmp_path / "run", checkpoint.path, worse.path)
    first, second = (model["mean_bits_per_byte"] for model in result["models"])
    mean = result["bits_per_byte_difference"]["mean"]
    assert mean["difference"] == pytest.approx(first - second, rel=1e-9)
    assert mean["low"] <= mean["difference"] <= mean["high"]
    assert set(result["bits_per_byte_difference"]) == {"prose", "reference", "code", "mean"}
    same = validated(config, tmp_path / "run", checkpoint.path, config.run.dir / "export" / "model.nemo")
    assert abs(same["bits_per_byte_difference"]["mean"]["high"]) < 1e-4


def test_a_model_reads_the_documents_in_its_own_tokens(exported: tuple[RunConfig, Checkpoint], tmp_path: Path) -> None:
    """A byte-level tokenizer in place of the model's: other tokens, the same bytes."""
    config, checkpoint = exported
    folder = tmp_path / "hf"
    shutil.copytree(config.run.dir / "export" / "hf", folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "fingerprint.json").unlink()
    (model,) = validated(config, tmp_path / "run", folder)["models"]
    expected = find_result(config, checkpoint)["domains"]
    assert model["tokenizer_fingerprint"] != Tokenizer.load(config.run.dir / "tokenizer").fingerprint
    for name, score in model["domains"].items():
        assert score["text_bytes"] == expected[name]["text_bytes"]
        assert score["tokens"] > 1.5 * expected[name]["tokens"]


def test_what_cannot_be_scored_is_said(exported: tuple[RunConfig, Checkpoint], tmp_path: Path) -> None:
    config, checkpoint = exported
    with pytest.raises(UserError, match="from: names 3 models; expected one, or two to compare"):
        validated(config, tmp_path / "run", *[checkpoint.path] * 3)
    with pytest.raises(UserError, match="absent does not exist; expected the folder of a run"):
        validated(config, tmp_path / "run", tmp_path / "absent")
    longer = config.model_copy(update={"validation": config.validation.model_copy(update={"eval_len": 256})})
    with pytest.raises(UserError, match=r"validation\.eval_len: is 256; expected at most 128, the context of"):
        validated(longer, tmp_path / "run", config.run.dir / "export" / "hf")
