"""`.nemo` files: restored by NeMo in a fresh process, and refused with a name for whatever is wrong with them."""

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nemo.core import ModelPT
from nemo.core.classes import common as nemo_classes
from nemo.core.classes.common import ALLOWED_TARGET_PREFIXES, UnsafeTargetError
from omegaconf import OmegaConf

from data_prep.corpus.manifest import load_manifest
from data_prep.tokenizers.tokenizer import Tokenizer
from tests.export.conftest import Fresh
from tests.export.nemo_files import CONFIG, WEIGHTS, change_config, change_weights, repack, with_member
from tests.ranks import run_ranks
from yxanul_nemo.checkpoint.committed import Checkpoint
from yxanul_nemo.checkpoint.restore import restore_model
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.config.training import ParallelConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.machine.runtime import init_process_groups
from yxanul_nemo.model import YxanulModel
from yxanul_nemo.model.build import reference_precision
from yxanul_nemo.model.nemo_archive import open_archive

EXPECTED_KEYS = {"gpt", "vocab_size", "tokenizer", "target", "nemo_version"}
FC2 = "gpt.decoder.layers.1.mlp.linear_fc2.weight"


@pytest.fixture(scope="module")
def nemo_file(exported: tuple[RunConfig, Checkpoint]) -> Path:
    return exported[0].run.dir / "export" / "model.nemo"


def some_ids() -> torch.Tensor:
    return torch.randint(0, 700, (2, 40), generator=torch.Generator().manual_seed(0))


def restore(path: Path, **options: Any) -> YxanulModel:
    return YxanulModel.restore_from(str(path), map_location=torch.device("cpu"), **options)


def test_a_fresh_process_restores_it_with_equal_logits(
    exported: tuple[RunConfig, Checkpoint], fresh: dict[str, Fresh]
) -> None:
    config, checkpoint = exported
    model = restore_model(config, checkpoint, load_manifest(config.data_dir).vocab_size, *reference_precision())
    told = fresh["nemo"].results("told")
    with torch.no_grad():
        assert torch.equal(torch.from_numpy(fresh["nemo"].results("logits")), model(fresh["nemo"].ids_BT))
    fingerprint = Tokenizer.load(config.run.dir / "tokenizer").fingerprint
    assert told == [fingerprint, []], "the tokenizer is in it, and training is not needed"


def test_nemos_generic_restore_goes_on_refusing_it(nemo_file: Path) -> None:
    """NeMo would import the class that the file names, so it takes those of its own namespaces alone."""
    with pytest.raises(UnsafeTargetError, match="YxanulModel"):
        ModelPT.restore_from(str(nemo_file), map_location=torch.device("cpu"))


def test_nemos_generic_restore_gives_the_same_model_where_a_program_allows_it(
    nemo_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nemo_classes, "ALLOWED_TARGET_PREFIXES", [*ALLOWED_TARGET_PREFIXES, "yxanul_nemo.model."])
    theirs, ours = ModelPT.restore_from(str(nemo_file), map_location=torch.device("cpu")).eval(), restore(nemo_file)
    assert type(theirs) is YxanulModel and theirs.tokenizer.fingerprint == ours.tokenizer.fingerprint
    with torch.no_grad():
        assert torch.equal(theirs(some_ids()), ours.eval()(some_ids()))
    theirs.save_to(str(tmp_path / "again.nemo"))
    assert restore(tmp_path / "again.nemo").tokenizer.fingerprint == ours.tokenizer.fingerprint


def test_the_archive_is_nemos_with_the_expected_members(nemo_file: Path) -> None:
    with open_archive(nemo_file) as archive:
        members = {path.name for path in archive.folder.iterdir()}
        config = OmegaConf.to_container(OmegaConf.load(archive.folder / CONFIG))
    assert set(config) == EXPECTED_KEYS
    assert config["target"] == f"{YxanulModel.__module__}.{YxanulModel.__qualname__}"
    artifacts = {value.removeprefix("nemo:") for value in config["tokenizer"].values() if value.startswith("nemo:")}
    assert members == {CONFIG, WEIGHTS} | artifacts
    assert {name[33:] for name in artifacts} == {
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
    }  # fmt: skip


def test_the_configuration_can_be_read_changed_and_given_back(nemo_file: Path, tmp_path: Path) -> None:
    config = YxanulModel.restore_from(str(nemo_file), return_config=True)
    assert OmegaConf.is_config(config)
    assert config.gpt.num_layers == 2
    OmegaConf.save(config, tmp_path / "same.yaml")
    config.gpt.norm_eps = 0.5
    other, same = (
        restore(nemo_file, override_config_path=config),
        restore(nemo_file, override_config_path=str(tmp_path / "same.yaml")),
    )
    with torch.no_grad():
        plain = restore(nemo_file)(some_ids())
        assert torch.equal(same(some_ids()), plain)
        assert not torch.allclose(other(some_ids()), plain)
    config.gpt.num_layers = 3
    with pytest.raises(UserError, match=r"lacks 'decoder\.layers\.2\.input_layernorm\.weight'"):
        restore(nemo_file, override_config_path=config)
    config["_target_"] = "os.system"
    with pytest.raises(UserError, match="_target_"):
        restore(nemo_file, override_config_path=config)


def test_a_restored_model_saves_again(nemo_file: Path, tmp_path: Path) -> None:
    first = restore(nemo_file)
    for path in (tmp_path / "again.nemo", tmp_path / "once_more.nemo"):
        first.save_to(str(path))
    second = restore(tmp_path / "once_more.nemo")
    with torch.no_grad():
        assert torch.equal(second(some_ids()), first(some_ids()))
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert second.state_dict().keys() == first.state_dict().keys()


def test_weights_are_complete_whatever_strict_says(nemo_file: Path, tmp_path: Path) -> None:
    broken = repack(nemo_file, tmp_path / "x.nemo", change_weights(lambda weights: weights.pop(FC2)))
    with pytest.raises(UserError, match=r"lacks 'decoder\.layers\.1\.mlp\.linear_fc2\.weight'"):
        restore(broken, strict=False)


def swap_two_tokens(folder: Path) -> None:
    path = next(folder.glob("*_tokenizer.json"))
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    first, second = [token for token in vocab if len(token) == 1][:2]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    path.write_text(json.dumps(tokenizer))


def compress(folder: Path) -> None:
    path = folder / WEIGHTS
    with zipfile.ZipFile(path) as source:
        parts = {info.filename: source.read(info) for info in source.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name, data in parts.items():
            target.writestr(name, data)


WRONG_WEIGHTS: dict[str, tuple[Callable[[dict], object], str]] = {
    "missing": (lambda w: w.pop(FC2), r"lacks 'decoder\.layers\.1\.mlp\.linear_fc2\.weight'"),
    "unknown": (lambda w: w.update({"gpt.decoder.extra": torch.zeros(2)}), r"has the unknown 'decoder\.extra'"),
    "foreign": (lambda w: w.update({"hook": torch.zeros(2)}), "has the unknown 'hook'"),
    "shape": (
        lambda w: w.update({FC2: w[FC2].T.contiguous()}),
        r"has 'decoder\.layers\.1\.mlp\.linear_fc2\.weight' as \[64, 32\] instead of \[32, 64\]",
    ),
    "integers": (lambda w: w.update({FC2: w[FC2].int()}), r"has 'gpt\.decoder.*' as torch\.int32"),
    "sparse": (lambda w: w.update({FC2: w[FC2].to_sparse()}), r"it names torch\._utils\._rebuild_sparse_tensor"),
    "NaN": (
        lambda w: w[FC2].view(-1)[3:5].fill_(torch.nan),
        r"has 2 of 2,048 values of 'decoder\.layers\.1\.mlp\.linear_fc2\.weight'",
    ),
    "infinite": (
        lambda w: w[FC2].view(-1)[0:1].fill_(-torch.inf),
        r"has 1 of 2,048 values of .*that are NaN or infinite",
    ),
    "no tensor": (lambda w: w.update({FC2: [1.0]}), r"holds a list as 'gpt\.decoder"),
}


@pytest.mark.parametrize("what", WRONG_WEIGHTS)
def test_wrong_weights_are_refused_by_name(nemo_file: Path, tmp_path: Path, what: str) -> None:
    change, message = WRONG_WEIGHTS[what]
    broken = repack(nemo_file, tmp_path / "x.nemo", change_weights(change))
    with pytest.raises(UserError, match=message):
        restore(broken)
    # The same words where a file is read without NeMo.
    with pytest.raises(UserError, match=message), open_archive(broken) as archive:
        archive.weights()


WRONG_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "another tokenizer": (swap_two_tokens, r"\(tokenizer\): has the fingerprint [0-9a-f]{16}; expected [0-9a-f]{16}, which the"),
    "compressed weights": (compress, "has the compressed part"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"holds no {WEIGHTS}"),
    "no configuration": (lambda f: (f / CONFIG).unlink(), f"holds no {CONFIG}"),
    "no tokenizer": (lambda f: next(f.glob("*_tokenizer.json")).unlink(), r"holds no [0-9a-f]{32}_tokenizer\.json"),
    "damaged tokenizer": (
        lambda f: next(f.glob("*_tokenizer.json")).write_text("[1]"), r"\(tokenizer\): tokenizer\.json: is no JSON object"
    ),
    "damaged weights": (lambda f: (f / WEIGHTS).write_bytes(b"PK" + bytes(200_000)), "cannot be read as tensors"),
    "an unnamed member": (lambda f: (f / ("0" * 32 + "_tokenizer.json")).write_text("{}"), "has an unknown member '0{32}_"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG_FILES)
def test_wrong_files_are_refused_by_name(nemo_file: Path, tmp_path: Path, what: str) -> None:
    change, message = WRONG_FILES[what]
    broken = repack(nemo_file, tmp_path / "x.nemo", change)
    with pytest.raises(UserError, match=message):
        restore(broken)


def set_tokenizer(key: str, value: object) -> Callable[[dict], None]:
    return lambda config: config["tokenizer"].update({key: value})


WRONG_CONFIGS: dict[str, tuple[Callable[[dict], object], str]] = {
    "_target_": (lambda c: c.update({"_target_": "os.system"}), "has the key '_target_', which builds objects"),
    "deep _target_": (lambda c: c["gpt"].update({"x": [{"_target_": "os.system"}]}), "has the key '_target_'"),
    "target": (lambda c: c.update({"target": "nemo.core.ModelPT"}), r"target='nemo\.core\.ModelPT', a class that"),
    "interpolation": (lambda c: c["gpt"].update({"name": "${oc.env:HOME}"}), "has an interpolation in gpt.name"),
    "unknown key": (lambda c: c.update({"train_ds": {"a": 1}}), "train_ds: Extra inputs are not permitted"),
    "unknown shape key": (lambda c: c["gpt"].update({"biases": True}), r"gpt\.biases: Extra inputs"),
    "impossible shape": (lambda c: c["gpt"].update({"kv_groups": 3}), "not a multiple of kv_groups=3"),
    "enormous shape": (lambda c: c["gpt"].update({"hidden_size": 2**17}), r"has [\d,]+ bytes; expected [\d,]{9,} to"),
    "no shape": (lambda c: c.pop("gpt"), "gpt: Field required"),
    "no tokenizer": (lambda c: c["tokenizer"].pop("tokenizer_json"), "neither tokenizer_json nor sentencepiece_model"),
    "too many layers": (lambda c: c["gpt"].update({"num_layers": 10**9}), r"gpt\.num_layers: Input should be less"),
    "another's fingerprint": (set_tokenizer("fingerprint", "0" * 64), "expected 0000000000000000, which the model"),
    "a file of this machine": (set_tokenizer("tokenizer_json", "/etc/passwd"), "tokenizer_json is '/etc/passwd'"),
    "a path out of the archive": (set_tokenizer("tokenizer_json", "nemo:../../etc/x_tokenizer.json"), "tokenizer_json is 'nemo:"),
    "a key that is a path": (set_tokenizer("../../x", "nemo:y"), r"tokenizer\.\.\./\.\./x: Extra inputs"),
    "an unknown library": (set_tokenizer("library", "pickle"), r"tokenizer\.library: Input should be 'tokenizers'"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG_CONFIGS)
def test_configurations_are_data_and_nothing_else(nemo_file: Path, tmp_path: Path, what: str) -> None:
    change, message = WRONG_CONFIGS[what]
    broken = repack(nemo_file, tmp_path / "x.nemo", change_config(change))
    with pytest.raises(UserError, match=message):
        restore(broken)


class Payload:
    """What pickle calls on loading: it makes a folder, as proof that it was called."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.mkdir, (self.marker,)


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_the_weights_is_never_run(
    nemo_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forced: bool, legacy: bool
) -> None:
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker = tmp_path / "executed"

    def poison(folder: Path) -> None:
        weights = torch.load(folder / WEIGHTS, weights_only=True)
        weights["gpt.hook"] = Payload(marker)
        torch.save(weights, folder / WEIGHTS, _use_new_zipfile_serialization=not legacy)

    broken = repack(nemo_file, tmp_path / "x.nemo", poison)
    with pytest.raises(UserError, match="cannot be read as tensors"):
        restore(broken)
    with pytest.raises(UserError, match="cannot be read as tensors"), open_archive(broken) as archive:
        archive.weights()
    assert not marker.exists()
    # The same file is dangerous: a reader that unpickles it runs the code.
    repack(broken, tmp_path / "y.nemo", lambda folder: torch.load(folder / WEIGHTS, weights_only=False))
    assert marker.exists()


def test_code_as_bare_pickle_is_never_run(nemo_file: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    payload = pickle.dumps({"x": Payload(marker)}) + bytes(200_000)
    broken = repack(nemo_file, tmp_path / "x.nemo", lambda folder: (folder / WEIGHTS).write_bytes(payload))
    with pytest.raises(UserError, match="cannot be read as tensors"):
        restore(broken)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["../evil.py", "/tmp/evil.py", "a/../../evil.py", "sitecustomize.py", f"./{CONFIG}"])
def test_members_that_do_not_belong_there_are_refused(nemo_file: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "box").mkdir()
    before = sorted(tmp_path.rglob("*"))
    broken = with_member(nemo_file, tmp_path / "box" / "x.nemo", name)
    with pytest.raises(UserError, match=r"unsafe path|unknown member|twice"):
        restore(broken)
    assert sorted(tmp_path.rglob("*")) == [*before, broken]


def test_files_that_are_no_archives_are_refused(nemo_file: Path, tmp_path: Path) -> None:
    (tmp_path / "short.nemo").write_bytes(nemo_file.read_bytes()[:100_000])
    (tmp_path / "text.nemo").write_text("hello")
    for name, message in (
        ("absent.nemo", "does not exist"),
        ("short.nemo", "is truncated"),
        ("text.nemo", "is truncated"),
    ):
        with pytest.raises(UserError, match=rf"{name}: {message}"):
            restore(tmp_path / name)


def losses_of_a_part(path: str) -> np.ndarray:
    """On one of two tensor-parallel ranks, which holds a half of most weights: the loss of each token."""
    init_process_groups(ParallelConfig(device="cpu", layer_spec="torch", tensor_parallel=2), "cpu", seed=0)
    model = restore(Path(path))
    assert model.gpt.embedding.word_embeddings.weight.size(0) == 768 // 2
    with pytest.raises(UserError, match="the model is split over 2 ranks"):
        model.save_to(f"{path}.half.nemo")
    with torch.no_grad():
        return model(some_ids(), some_ids().roll(-1, dims=1)).numpy()


def test_two_tensor_parallel_ranks_hold_a_half_each_and_agree(nemo_file: Path) -> None:
    with torch.no_grad():
        expected = restore(nemo_file)(some_ids(), some_ids().roll(-1, dims=1))
    for losses in run_ranks(losses_of_a_part, 2, str(nemo_file)):
        torch.testing.assert_close(torch.from_numpy(losses), expected, rtol=1e-5, atol=1e-4)
    assert expected.std() > 1
