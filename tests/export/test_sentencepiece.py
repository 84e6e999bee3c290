"""A run with a sentencepiece tokenizer: its `.nemo` file and its folder hold the tokenizer too."""

from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import torch
from transformers import AutoTokenizer

from data_prep.prepare import run_data_stage
from data_prep.tokenizers.tokenizer import Tokenizer
from tests.export.conftest import commit_random_weights
from tests.export.nemo_files import repack
from tests.export.test_export import model_of
from yxanul_nemo.config.data import TokenizerConfig
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.export.export import Exporter, export_checkpoint
from yxanul_nemo.export.generate import generate
from yxanul_nemo.model import YxanulModel

TEXTS = ["The list of functions", "x = 12345, y", "two  spaces and 你好"]


@pytest.fixture(scope="module")
def exported_run(make_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "text").write_text(
        "\n".join(f"the list of {i} functions returns number {i * i}, or nothing" for i in range(500))
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "bpe"), model_type="bpe", vocab_size=400, byte_fallback=True,
        minloglevel=2,
    )  # fmt: skip
    tokenizer = TokenizerConfig(name="p", kind="sentencepiece", path=folder / "bpe.model", eos_token="</s>")
    config = make_config(f"run.dir={folder / 'run'}").model_copy(update={"tokenizer": tokenizer})
    run_data_stage(config)
    commit_random_weights(config)
    export_checkpoint(config)
    return config


@torch.no_grad()
def test_the_nemo_file_restores_with_it(exported_run: RunConfig) -> None:
    config = exported_run
    from yxanul_nemo.checkpoint.store import CheckpointStore

    expected, own = (
        model_of(config, CheckpointStore(config.run.dir / "checkpoints").newest_good()),
        Tokenizer.load(config.run.dir / "tokenizer"),
    )
    restored = YxanulModel.restore_from(str(config.run.dir / "export" / "model.nemo"), map_location=torch.device("cpu"))
    assert restored.tokenizer.library == "sentencepiece" and restored.tokenizer.fingerprint == own.fingerprint
    for text in TEXTS:
        assert restored.tokenizer.encode(text).tolist() == own.encode(text).tolist()
    ids_BT = torch.randint(0, own.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    assert torch.equal(restored.eval()(ids_BT), expected(ids_BT))


def test_all_exports_write_the_same_text_and_transformers_has_the_tokenizer(exported_run: RunConfig) -> None:
    folder = exported_run.run.dir / "export"
    texts = {generate(folder / name, "the list", 10, temperature=0, device="cpu").text for name in ("model.nemo", "hf")}
    assert len(texts) == 1
    own, theirs = Tokenizer.load(exported_run.run.dir / "tokenizer"), AutoTokenizer.from_pretrained(folder / "hf")
    assert [theirs(text).input_ids for text in TEXTS] == [[own.eos_id, *own.encode(t).tolist()] for t in TEXTS]


def test_without_its_file_or_with_another_it_is_refused(exported_run: RunConfig, tmp_path: Path) -> None:
    source = exported_run.run.dir / "export" / "model.nemo"
    lacking = repack(source, tmp_path / "a.nemo", lambda f: next(f.glob("*_tokenizer.model")).unlink())
    with pytest.raises(UserError, match=r"holds no [0-9a-f]{32}_tokenizer\.model"):
        YxanulModel.restore_from(str(lacking))
    damaged = repack(source, tmp_path / "b.nemo", lambda f: next(f.glob("*_tokenizer.model")).write_bytes(b"x" * 100))
    with pytest.raises(UserError, match=r"\(tokenizer\)"):
        YxanulModel.restore_from(str(damaged))


def test_llama_cpps_file_is_refused_before_anything_is_written(exported_run: RunConfig) -> None:
    export = exported_run.export.model_copy(update={"formats": ["gguf"]})
    with pytest.raises(UserError, match="has gguf, and the tokenizer is of sentencepiece"):
        Exporter(exported_run.model_copy(update={"export": export}))
