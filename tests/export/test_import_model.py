"""Exports as the first checkpoint of a new run."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_prep.corpus.manifest import load_manifest
from tests.export.conftest import MakeRun
from tests.export.nemo_files import change_config, change_weights, repack
from yxanul_nemo.checkpoint.committed import Checkpoint
from yxanul_nemo.checkpoint.restore import restore_model
from yxanul_nemo.checkpoint.store import CheckpointStore
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.export.export import export_checkpoint
from yxanul_nemo.export.import_model import import_model
from yxanul_nemo.launch.stages import run_stages
from yxanul_nemo.model.build import reference_precision
from yxanul_nemo.model.gpt import YxanulGPT
from yxanul_nemo.training.prepare import prepare_phase


@pytest.fixture
def new_run(
    exported: tuple[RunConfig, Checkpoint], tmp_path: Path, make_config: Callable[..., RunConfig]
) -> Callable[..., RunConfig]:
    """`new_run(*overrides)`: another run on the same data, with other initial weights."""

    def make(*overrides: str) -> RunConfig:
        folder = tmp_path / "new"
        folder.mkdir(exist_ok=True)
        if not (folder / "tokenizer").exists():
            (folder / "tokenizer").symlink_to(exported[0].run.dir / "tokenizer")
        return make_config(f"run.dir={folder}", f"data.dir={exported[0].data_dir}", "run.seed=77", *overrides)

    return make


def restored(config: RunConfig, checkpoint: Checkpoint) -> YxanulGPT:
    return restore_model(config, checkpoint, load_manifest(config.data_dir).vocab_size, *reference_precision())


def same_weights(one: YxanulGPT, other: YxanulGPT) -> bool:
    pairs = zip(one.named_parameters(), other.named_parameters(), strict=True)
    return all(name == its_name and torch.equal(a, b) for (name, a), (its_name, b) in pairs)


def test_training_goes_on_from_a_nemo_files_weights_exactly(
    exported: tuple[RunConfig, Checkpoint], new_run: Callable[..., RunConfig]
) -> None:
    config, source = new_run(), exported[0].run.dir / "export" / "model.nemo"
    checkpoint = import_model(source, config)
    assert CheckpointStore(config.run.dir / "checkpoints").newest_good() == checkpoint
    ledger = checkpoint.read_ledger()
    assert (checkpoint.tokens, ledger.phase) == (0, 0)
    assert ledger.notes[0].startswith("weights imported from model.nemo, SHA-256 ")
    trained = restored(*exported)
    prepared = prepare_phase(config, 1)
    assert same_weights(prepared.backend.model, trained)
    assert prepared.ledger.phase == 1
    assert prepared.ledger.tokens_total == 0
    # One step changes them: the optimizer is there, and starts afresh.
    ids = torch.randint(0, 700, (1, 2, 17), generator=torch.Generator().manual_seed(0))
    result = prepared.backend.train_step(ids[..., :-1].contiguous(), ids[..., 1:].contiguous(), lr=1e-3, grad_clip=1.0)
    with torch.no_grad():
        expected = trained(ids[0, :, :-1], ids[0, :, 1:].contiguous()).mean()
    assert float(result.loss) == pytest.approx(expected.item(), rel=1e-5)
    assert not same_weights(prepared.backend.model, trained)


def split_weights(folder: Path) -> None:
    """Two files and an index in place of one file, as large models come."""
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(whole))}
    for file in set(weight_map.values()):
        save_file({name: whole[name] for name in whole if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("override", ["export.factorized=true", "export.dtype=float32"])
def test_a_folder_comes_back_as_the_model(make_run: MakeRun, new_run: Callable[..., RunConfig], override: str) -> None:
    made, checkpoint = make_run("export.formats=[hf]", override)
    export_checkpoint(made)
    if made.export.factorized:
        split_weights(made.run.dir / "export" / "hf")
    config = new_run()
    again, model = restored(config, import_model(made.run.dir / "export" / "hf", config)), restored(made, checkpoint)
    ids = torch.randint(0, 700, (2, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (again(ids) - model(ids)).abs().max() < 1e-4
    table = "embedding.word_embeddings.weight"
    for (name, a), (_, b) in zip(again.named_parameters(), model.named_parameters(), strict=True):
        if name == table:
            a, b = a[:700], b[:700]
        if "embedding" not in name or made.export.factorized:
            assert torch.equal(a, b), name


def test_a_rounded_table_is_refused_with_the_way_out(make_run: MakeRun, new_run: Callable[..., RunConfig]) -> None:
    made, _ = make_run("export.formats=[nemo,hf]", "export.dtype=bfloat16")
    export_checkpoint(made)
    config = new_run()
    with pytest.raises(UserError, match=r"no product of rank 16: .*Import its \.nemo file"):
        import_model(made.run.dir / "export" / "hf", config)
    assert not (config.run.dir / "checkpoints").exists()
    import_model(made.run.dir / "export" / "model.nemo", config)


def test_another_padding_of_the_vocabulary_is_no_obstacle(
    exported: tuple[RunConfig, Checkpoint], new_run: Callable[..., RunConfig]
) -> None:
    config = new_run("model.vocab_pad_multiple=512")
    again = restored(config, import_model(exported[0].run.dir / "export" / "model.nemo", config))
    assert again.embedding.word_embeddings.weight.shape == (1024, 16)
    ids = torch.randint(0, 700, (2, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(again(ids), restored(*exported)(ids), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.num_layers=3", r"model\.num_layers: is 3; expected 2, as in .*"),
        ("model.ffn_hidden_size=96", r"model\.ffn_hidden_size: is 96; expected 64"),
        ("model.kv_groups=4", r"model\.kv_groups: is 4; expected 2"),
        ("model.rope_base=500", r"model\.rope_base: is 500\.0; expected 10000\.0"),
        ("model.norm_eps=1e-6", r"model\.norm_eps: is 1e-06; expected 1e-05"),
    ],
)
def test_a_model_of_another_shape_is_refused_by_key(
    exported: tuple[RunConfig, Checkpoint], new_run: Callable[..., RunConfig], override: str, message: str
) -> None:
    config = new_run(override)
    for source in ("model.nemo", "hf"):
        with pytest.raises(UserError, match=message):
            import_model(exported[0].run.dir / "export" / source, config)
    assert not (config.run.dir / "checkpoints").exists()


def test_what_does_not_fit_is_refused_and_nothing_is_left(
    exported: tuple[RunConfig, Checkpoint], new_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config, good = new_run(), exported[0].run.dir / "export" / "model.nemo"
    missing = repack(good, tmp_path / "a.nemo", change_weights(lambda w: w.pop("gpt.decoder.final_layernorm.weight")))
    strange = repack(good, tmp_path / "b.nemo", change_config(lambda c: c.update({"_target_": "os.system"})))
    folder = tmp_path / "hf"
    folder.mkdir()
    untied = json.loads((exported[0].run.dir / "export" / "hf" / "config.json").read_text()) | {
        "tie_word_embeddings": False
    }
    (folder / "config.json").write_text(json.dumps(untied))
    for name in ("tokenizer.json", "special_tokens_map.json"):
        (folder / name).write_bytes((exported[0].run.dir / "export" / "hf" / name).read_bytes())
    for source, message in (
        (missing, r"lacks 'decoder\.final_layernorm\.weight'"),
        (strange, "_target_"),
        (folder, "tie_word_embeddings is False; expected True"),
        (tmp_path, r"holds no config\.json"),
        (tmp_path / "absent", "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            import_model(source, config)
    assert not (config.run.dir / "checkpoints").exists()


def test_a_run_that_has_begun_is_not_overwritten(exported: tuple[RunConfig, Checkpoint], make_run: MakeRun) -> None:
    config, checkpoint = make_run()
    with pytest.raises(UserError, match="holds checkpoints already; expected a run that has not begun"):
        import_model(exported[0].run.dir / "export" / "model.nemo", config)
    assert CheckpointStore(config.run.dir / "checkpoints").newest_good() == checkpoint


def test_data_of_another_tokenizer_is_refused(
    exported: tuple[RunConfig, Checkpoint], new_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = new_run()
    data = tmp_path / "data"
    data.mkdir()
    manifest = load_manifest(config.data_dir).model_copy(update={"tokenizer_fingerprint": "0" * 64})
    manifest.save(data)
    other = config.model_copy(update={"data": config.data.model_copy(update={"dir": data})})
    with pytest.raises(UserError, match=r"\(tokenizer\): has the fingerprint [0-9a-f]{16}; expected 0{16}, with which"):
        import_model(exported[0].run.dir / "export" / "model.nemo", other)


def test_the_stage_imports_what_from_names(
    exported: tuple[RunConfig, Checkpoint], new_run: Callable[..., RunConfig]
) -> None:
    config = new_run("stage=import", f"from={exported[0].run.dir / 'export' / 'model.nemo'}")
    run_stages(config)
    newest = CheckpointStore(config.run.dir / "checkpoints").newest_good()
    assert newest.tokens == 0 and same_weights(restored(config, newest), restored(*exported))
    with pytest.raises(UserError, match=r"from: is not set; expected a \.nemo file or a Hugging Face folder"):
        run_stages(config.model_copy(update={"from_": None}))
    with pytest.raises(UserError, match="from: is given with stage=train; expected stage="):
        run_stages(config.model_copy(update={"stage": "train"}))
