"""llama.cpp's file: read by transformers' own reader of the format, and refused where llama.cpp has no such tokenizer."""

import json
from pathlib import Path

import gguf
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from data_prep.tokenizers.tokenizer import Tokenizer
from tests.export.conftest import MakeRun
from tests.export.test_export import model_of
from yxanul_nemo.checkpoint.committed import Checkpoint
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.export.export import Exporter, export_checkpoint
from yxanul_nemo.export.gguf_rules import require_expressible
from yxanul_nemo.export.parity import ParityError
from yxanul_nemo.model.gpt import YxanulGPT


@pytest.fixture(scope="module")
def made(make_run: MakeRun) -> tuple[RunConfig, Checkpoint]:
    config, checkpoint = make_run("export.formats=[gguf]")
    export_checkpoint(config)
    return config, checkpoint


@torch.no_grad()
def test_another_reader_of_the_format_finds_the_model(made: tuple[RunConfig, Checkpoint]) -> None:
    config, checkpoint = made
    folder, model = config.run.dir / "export", model_of(config, checkpoint)
    record = json.loads((folder / "export.json").read_text())["parity"]["model.gguf"]
    assert 0 < record["max_logit_difference"] < 1e-4 and record["equal_greedy_tokens"] == 64
    # What `from_pretrained(gguf_file=...)` does, which insists on the package accelerate.
    described = load_gguf_checkpoint(str(folder / "model.gguf"))["config"]
    with torch.device("meta"):
        shapes = LlamaForCausalLM(LlamaConfig(**described))
    read = load_gguf_checkpoint(str(folder / "model.gguf"), return_tensors=True, model_to_load=shapes)
    theirs = LlamaForCausalLM(LlamaConfig(**described)).eval()
    left = theirs.load_state_dict(read["tensors"], strict=False)
    assert left.missing_keys in ([], ["lm_head.weight"]) and not left.unexpected_keys
    theirs.tie_weights()
    ids_BT = torch.randint(0, 700, (3, 50), generator=torch.Generator().manual_seed(3))
    assert (theirs(ids_BT).logits - model(ids_BT)).abs().max() < 1e-4


def test_it_holds_the_tokenizer(made: tuple[RunConfig, Checkpoint]) -> None:
    config, _ = made
    told = {
        key: field.contents() for key, field in gguf.GGUFReader(config.run.dir / "export" / "model.gguf").fields.items()
    }
    tokenizer = Tokenizer.load(config.run.dir / "tokenizer")
    described = json.loads((config.run.dir / "tokenizer" / "tokenizer.json").read_text())
    tokens, kinds = told["tokenizer.ggml.tokens"], told["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == tokenizer.vocab_size
    assert all(tokens[number] == text for text, number in described["model"]["vocab"].items())
    assert kinds[tokenizer.eos_id] == gguf.TokenType.CONTROL and kinds.count(gguf.TokenType.CONTROL) == len(
        described["added_tokens"]
    )
    assert [merge.split(" ") for merge in told["tokenizer.ggml.merges"]] == described["model"]["merges"]
    assert (told["tokenizer.ggml.model"], told["tokenizer.ggml.pre"]) == ("gpt2", "superbpe")
    assert told["tokenizer.ggml.bos_token_id"] == told["tokenizer.ggml.eos_token_id"] == tokenizer.eos_id
    assert told["tokenizer.ggml.add_bos_token"] is True


def test_bf16_matrices_and_fp32_norms(make_run: MakeRun) -> None:
    config, _ = make_run("export.formats=[gguf]", "export.dtype=bfloat16")
    export_checkpoint(config)
    folder = config.run.dir / "export"
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(folder / "model.gguf").tensors}
    for name, tensor in tensors.items():
        is_norm = "norm" in name
        assert tensor.tensor_type == (gguf.GGMLQuantizationType.F32 if is_norm else gguf.GGMLQuantizationType.BF16)
    record = json.loads((folder / "export.json").read_text())["parity"]["model.gguf"]
    assert record["max_logit_difference"] < 1e-4 < record["rounding_logit_difference"]


def test_a_damaged_file_is_no_export(make_run: MakeRun) -> None:
    config, _ = make_run("export.formats=[gguf]")

    class Damaging(Exporter):
        def write(self, folder: Path, model: YxanulGPT) -> None:
            super().write(folder, model)
            reader = gguf.GGUFReader(folder / "model.gguf", "r+")
            next(t for t in reader.tensors if t.name == "blk.1.attn_k.weight").data[3] += 0.5
            reader.data.flush()

    with pytest.raises(ParityError, match=r"model\.gguf: logits differ by"):
        Damaging(config).run()
    assert not (config.run.dir / "export").exists()


def test_tokenizers_that_llama_cpp_does_not_have_are_refused(
    made: tuple[RunConfig, Checkpoint], tmp_path: Path
) -> None:
    tokenizer = Tokenizer.load(made[0].run.dir / "tokenizer")
    assert require_expressible(tokenizer, made[0].run.dir / "tokenizer") == "superbpe"
    tokenizer.save(tmp_path)
    described = json.loads((tmp_path / "tokenizer.json").read_text())

    def name(**changes: object) -> str:
        (tmp_path / "tokenizer.json").write_text(json.dumps(described | changes))
        return require_expressible(tokenizer, tmp_path)

    words = described["pre_tokenizer"]["pretokenizers"]
    byte_level = words[-1] | {"use_regex": True}
    assert name(pre_tokenizer=byte_level) == "gpt-2"
    for changes in (
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [*words[:-1], byte_level]}},
        {"normalizer": {"type": "NFKC"}},
        {"pre_tokenizer": None},
    ):
        with pytest.raises(UserError, match=r"cuts text in a way that llama\.cpp has no name for"):
            name(**changes)
    tokenizer.library = "sentencepiece"
    with pytest.raises(UserError, match="the tokenizer is of sentencepiece"):
        require_expressible(tokenizer, tmp_path)
