"""Models by somebody else (Hugging Face folders, `.nemo` and GGUF files): read or refused, never a crash, a hang or a full memory."""

import gzip
import json
import re
import shutil
import struct
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.data_prep.conftest import tokenizer_folder  # noqa: F401 - a fixture
from tests.export.nemo_files import CONFIG, WEIGHTS, change_config, change_weights, repack
from tests.export.small_models import changed_json, gguf_file, hf_folder, nemo_file
from tests.hostile import attempt, changed, damaged
from yxanul_nemo.export.generate import generate
from yxanul_nemo.export.gguf_file import load_gguf
from yxanul_nemo.export.llama_shape import LlamaShape
from yxanul_nemo.export.source import load_source

FUZZ = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def good(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:  # noqa: F811
    folder = tmp_path_factory.mktemp("good")
    made = {
        "hf": hf_folder(folder / "hf", tokenizer_folder),
        "nemo": nemo_file(folder / "x.nemo", tokenizer_folder),
        "gguf": gguf_file(folder / "x.gguf", tokenizer_folder),
    }
    for name in ("hf", "nemo"):
        # Also imports what the first use of a model imports, which counts for none of the others.
        assert generate(made[name], "the quick", 3, device="cpu", temperature=0).tokens
    load_gguf(made["gguf"])
    return made


def try_source(kind: str, box: Path, source: Path) -> str:
    return attempt(kind, box, lambda: generate(source, "the quick", 2, device="cpu", temperature=0))


# Hugging Face folders


def folder_with(good: dict[str, Path], tmp_path: Path, change: Callable[[Path], object]) -> Path:
    folder = shutil.copytree(good["hf"], tmp_path / "hf")
    change(folder)
    return folder


def config(**changes: object) -> Callable[[Path], None]:
    return lambda folder: changed_json(folder / "config.json", **changes)


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors")

    return apply


def header(change: Callable[[dict], object], size: int | None = None) -> Callable[[Path], None]:
    """Change the header of the weights' file as no library would write it."""

    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        told = json.loads(raw[8 : 8 + length])
        change(told)
        text = json.dumps(told).encode()
        path.write_bytes((size or len(text)).to_bytes(8, "little") + text + raw[8 + length :])

    return apply


def index(weight_map: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return apply


NORM = "model.norm.weight"
QUANTIZED = {"quant_method": "bitsandbytes", "load_in_4bit": True}
FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "zero heads": (config(num_attention_heads=0), "num_attention_heads is 0"),
    "negative layers": (config(num_hidden_layers=-1), "num_hidden_layers is -1"),
    "a billion layers": (config(num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
    "many layers": (config(num_hidden_layers=1024), r"lacks 'model\.layers\.2\."),
    "layers as a text": (config(num_hidden_layers="2"), "num_hidden_layers is '2'"),
    "layers as a fraction": (config(num_hidden_layers=2.5), r"num_hidden_layers is 2\.5"),
    "layers as a truth": (config(num_hidden_layers=True), "num_hidden_layers is True"),
    "a wide model": (config(hidden_size=2**17), r"instead of \[131072\]"),
    "wider than any": (config(hidden_size=2**40), "hidden_size is 1099511627776"),
    "a number of 300 digits": (config(vocab_size=10**300), "a number of more than 18 digits"),
    "vocabulary of none": (config(vocab_size=0), "vocab_size is 0"),
    "heads that do not divide": (config(num_attention_heads=3), "not a multiple of num_attention_heads=3"),
    "odd heads": (config(head_dim=3), "head_dim=3 is odd"),
    "unknown activation": (config(hidden_act="os.system"), "hidden_act is 'os.system'"),
    "quantized": (config(quantization_config=QUANTIZED), "has quantization_config"),
    "another architecture": (config(model_type="gpt2"), "model_type is 'gpt2'"),
    "no architecture": (config(model_type=None), "model_type is None"),
    "epsilon that is no number": (config(rms_norm_eps=float("nan")), "rms_norm_eps is nan"),
    "infinite base": (config(rope_parameters={"rope_theta": float("inf")}), "rope.rope_theta is inf"),
    "unknown rope": (config(rope_parameters={"rope_type": "x.y:z"}), "rope.rope_type is 'x.y:z'"),
    "rope without a factor": (config(rope_parameters={"rope_type": "linear"}), "rope_type=linear needs factor"),
    "rope that is a list": (config(rope_parameters=[1]), "rope is a list"),
    "rope of half a head": (config(rope_parameters={"partial_rotary_factor": 0.5}), r"partial_rotary_factor is 0\.5"),
    "rank of a Llama": (config(embedding_rank=4), "embedding_rank is a key of model_type=yxanul"),
    "untied": (config(tie_word_embeddings=False), r"lacks 'lm_head\.weight'"),
    "with biases": (config(attention_bias=True, mlp_bias=True), r"lacks 'model\.layers\.0\.self_attn\.q_proj\.bias'"),
    "vocabulary below the tokenizer's": (config(vocab_size=200), r"instead of \[200, 16\]"),
    "config that is a list": (lambda f: (f / "config.json").write_text("[]"), "holds a JSON list"),
    "config of nothing": (lambda f: (f / "config.json").write_text(""), "not valid JSON"),
    "config over all bounds": (lambda f: (f / "config.json").write_text(" " * (2 << 20)), "more than 1,048,576 bytes"),
    "deep config": (lambda f: (f / "config.json").write_text('{"a":' * 50_000), "nests too deeply|not valid JSON"),
    "a key twice": (lambda f: (f / "config.json").write_text('{"vocab_size": 1, "vocab_size": 2}'), "is there twice"),
    "NaN": (tensors(lambda w: w[NORM][:2].fill_(torch.nan)), r"has 2 of 16 values of 'model\.norm\.weight' that are NaN"),
    "infinite": (tensors(lambda w: w[NORM][3:4].fill_(-torch.inf)), r"has 1 of 16 values of 'model\.norm\.weight'"),
    "integers": (tensors(lambda w: w.update({NORM: w[NORM].int()})), r"has 'model\.norm\.weight' as I32"),
    "truths": (tensors(lambda w: w.update({NORM: w[NORM] > 0})), r"has 'model\.norm\.weight' as BOOL"),
    "numbers of 8 bits": (tensors(lambda w: w.update({NORM: w[NORM].to(torch.float8_e4m3fn)})), "as F8_E4M3"),
    "missing": (tensors(lambda w: w.pop(NORM)), r"lacks 'model\.norm\.weight'"),
    "unknown": (tensors(lambda w: w.update(x=torch.zeros(1))), "has the unknown 'x'"),
    "scalar": (tensors(lambda w: w.update({NORM: torch.zeros(())})), r"as \[\] instead of \[16\]"),
    "a header without end": (header(lambda h: None, 2**63), "its header has 9,223,372,036,854,775,808 bytes"),
    "a header of nothing": (header(lambda h: h.clear()), "is no safetensors file"),
    "offsets outside": (header(lambda h: h[NORM].update(data_offsets=[0, 2**60])), "is no safetensors file"),
    "offsets backwards": (header(lambda h: h[NORM].update(data_offsets=[64, 0])), "is no safetensors file"),
    "a shape without data": (header(lambda h: h[NORM].update(shape=[2**40])), "is no safetensors file"),
    "a negative shape": (header(lambda h: h[NORM].update(shape=[-16])), "is no safetensors file"),
    "weights of nothing": (lambda f: (f / "model.safetensors").write_bytes(b""), "is no safetensors file"),
    "weights that are a folder": (
        lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors").mkdir()), "model.safetensors: does not exist"
    ),
    "an index that leads outside": (index({NORM: "../../x.safetensors"}), "a .safetensors file of this folder"),
    "an index to an absolute path": (index({NORM: "/etc/passwd"}), "a .safetensors file of this folder"),
    "an index of nothing": (index({}), "has no weight_map"),
    "an index that is a list": (index([NORM]), "has no weight_map"),
    "an index of too little": (index({NORM: "part.safetensors"}), "which model.safetensors.index.json gives to None"),
    "a pickle beside": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "model.safetensors: does not exist"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizers of the kind wanted"),
    "specials that are a list": (lambda f: (f / "special_tokens_map.json").write_text("[1]"), "holds a JSON list"),
    "an unknown end": (lambda f: (f / "special_tokens_map.json").write_text('{"eos_token": "<no>"}'), "has no token '<no>'"),
    "no end": (lambda f: (f / "special_tokens_map.json").write_text("{}"), "which token ends a document"),
    "a record of nothing known": (lambda f: (f / "fingerprint.json").write_text('{"library": "pickle"}'), "library 'pickle'"),
    "a record that is a list": (lambda f: (f / "fingerprint.json").write_text('{"library": ["x"]}'), r"library \['x'\]"),
}  # fmt: skip


@pytest.mark.parametrize("what", FOLDERS)
def test_a_hostile_folder_is_refused(good: dict[str, Path], tmp_path: Path, what: str) -> None:
    change, message = FOLDERS[what]
    refusal = try_source("Hugging Face folder", tmp_path, folder_with(good, tmp_path, change))
    assert re.search(message, refusal), refusal


FOREIGN_CODE = {
    "_attn_implementation": "someone/some-kernel",
    "attn_implementation": "someone/some-kernel",
    "_attn_implementation_internal": "someone/some-kernel",
    "experts_implementation": "someone/some-kernel",
    "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    "use_kernels": True,
    "pad_token_id": 10**9,
    "torchscript": True,
    "_name_or_path": "someone/else",
    "dtype": "float8_e4m3fn",
    "architectures": ["os.system"],
    "problem_type": "x",
    "tp_plan": {"model": "colwise"},
    "chunk_size_feed_forward": 7,
}


@pytest.mark.parametrize("key", FOREIGN_CODE)
def test_other_keys_of_a_configuration_reach_nothing(
    good: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """A package `kernels`, which transformers would ask to fetch and run code, is there and must not be used."""
    (tmp_path / "packages" / "kernels").mkdir(parents=True)
    marker = tmp_path / "executed"
    (tmp_path / "packages" / "kernels" / "__init__.py").write_text(f"open({str(marker)!r}, 'w')\n")
    (tmp_path / "packages" / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    folder = folder_with(good, tmp_path, config(**{key: FOREIGN_CODE[key]}))
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    told = []
    refusal = attempt("Hugging Face folder", tmp_path, lambda: told.append(load_source(folder, device="cpu")))
    assert refusal == "" and not marker.exists() and "kernels" not in sys.modules
    expected = load_source(good["hf"], device="cpu").model
    ids_BT = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(told[0].model(ids_BT).logits, expected(ids_BT).logits)


@given(data=st.data())
@FUZZ
def test_changed_configurations_are_read_or_refused(
    good: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = shutil.copytree(good["hf"], tmp_path_factory.mktemp("made") / "hf")
    made = data.draw(changed(json.loads((folder / "config.json").read_text())))
    (folder / "config.json").write_text(json.dumps(made))
    try_source("Hugging Face folder", folder, folder)


@given(data=st.data())
@FUZZ
def test_damaged_weights_are_read_or_refused(
    good: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = shutil.copytree(good["hf"], tmp_path_factory.mktemp("made") / "hf")
    path = folder / "model.safetensors"
    path.write_bytes(data.draw(damaged(path.read_bytes(), 2000)))
    try_source("Hugging Face folder", folder, folder)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"num_key_value_heads": 2, "head_dim": 6},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}},
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ],
    ids=str,
)  # fmt: skip
def test_every_kind_of_llama_is_what_transformers_makes_of_it(
    good: dict[str, Path], tmp_path: Path, changes: dict
) -> None:
    """The independent truth: transformers' own reader, on a folder that it wrote itself."""
    torch.manual_seed(1)
    plain = json.loads((good["hf"] / "config.json").read_text()) | changes
    theirs = LlamaForCausalLM(LlamaConfig.from_dict(plain))
    folder = shutil.copytree(good["hf"], tmp_path / "hf")
    theirs.save_pretrained(folder)
    shape = LlamaShape.of(json.loads((folder / "config.json").read_text()), folder)
    assert shape.weights() == {name: tuple(weight.shape) for name, weight in theirs.named_parameters()}
    ours, read = load_source(folder, device="cpu").model, AutoModelForCausalLM.from_pretrained(folder)
    ids_BT = torch.arange(60)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids_BT).logits, read(ids_BT).logits)


# .nemo files


def pickled(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Change the pickle inside the weights' file."""

    def apply(folder: Path) -> None:
        with zipfile.ZipFile(folder / WEIGHTS) as source:
            parts = {part.filename: source.read(part) for part in source.infolist()}
        with zipfile.ZipFile(folder / WEIGHTS, "w") as target:
            for name, data in parts.items():
                target.writestr(name, change(data) if name.endswith("data.pkl") else data)

    return apply


def doubling_tuple(levels: int) -> bytes:
    """A dictionary whose key is a tuple of a tuple twice of ...: its hash takes 2**levels steps."""
    memo = b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(levels))
    return b"\x80\x02}" + b")" + memo + b"K\x01s."


def overlapping(folder: Path) -> None:
    """All storages are one and the same bytes, many times over."""
    raw = (folder / WEIGHTS).read_bytes()
    with zipfile.ZipFile(folder / WEIGHTS) as source:
        largest = max(source.infolist(), key=lambda part: part.file_size)
    with zipfile.ZipFile(folder / WEIGHTS, "a") as target:
        for i in range(200):
            info = zipfile.ZipInfo(f"{largest.filename.rpartition('/')[0]}/{1000 + i}")
            info.file_size = info.compress_size = largest.file_size
            info.header_offset, info.CRC = largest.header_offset, largest.CRC
            target.filelist.append(info)
        target._didModify = True
    assert (folder / WEIGHTS).stat().st_size < 3 * len(raw)


def grown(name: str, size_bytes: int) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = next(folder.glob(f"*{name}"))
        with open(path, "ab") as handle:
            handle.write(b" " * size_bytes)

    return apply


BYTEARRAY = b"\x80\x02}X\x01\x00\x00\x00ac__builtin__\nbytearray\n\x8a\x08\x00\x00\x00\x00\x00\x01\x00\x00\x85Rs."
ARCHIVES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a buffer of a tebibyte": (pickled(lambda _: BYTEARRAY), r"it names __builtin__\.bytearray"),
    "tuples of tuples": (pickled(lambda _: doubling_tuple(60)), "twice"),
    "code": (pickled(lambda _: b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00id\x85R."), r"it names os\.system"),
    "another protocol": (pickled(lambda raw: b"\x80\x04\x95" + bytes(8) + raw[2:]), "instruction FRAME"),
    "a pickle without end": (pickled(lambda raw: raw[:-1]), "cannot be read as tensors"),
    "a pickle of nothing": (pickled(lambda _: b""), "cannot be read as tensors"),
    "parts over one another": (overlapping, "lie over one another"),
    "NaN": (change_weights(lambda w: next(iter(w.values())).fill_(torch.nan)), "that are NaN or infinite"),
    "integers": (change_weights(lambda w: w.update({name: w[name].long() for name in list(w)[3:]})), "as torch.int64"),
    "a view of one number": (
        change_weights(lambda w: w.update({"gpt.embedding.projection.weight": torch.zeros(1).expand(10**6, 10**6)})), "instead of"
    ),
    "a large configuration": (grown(CONFIG, 300_000), rf"\({CONFIG}\): has [\d,]+ bytes"),
    "a large tokenizer": (grown("_tokenizer.json", 50 << 20), r"_tokenizer\.json\): has [\d,]+ bytes"),
    "large weights": (grown(WEIGHTS, 2 << 20), rf"\({WEIGHTS}\): has [\d,]+ bytes"),
    "a billion layers": (change_config(lambda c: c["gpt"].update(num_layers=10**9)), r"gpt\.num_layers"),
    "a wide model": (change_config(lambda c: c["gpt"].update(hidden_size=2**17)), rf"\({WEIGHTS}\): has [\d,]+ bytes"),
    "padding without end": (change_config(lambda c: c["gpt"].update(vocab_pad_multiple=10**15)), r"gpt\.vocab_pad_multiple"),
    "an infinite base": (change_config(lambda c: c["gpt"].update(rope_base=float("inf"))), r"gpt\.rope_base"),
    "anchors": (lambda f: (f / CONFIG).write_text("a: &x [1, 2]\nb: [*x, *x]\n"), "uses YAML anchors"),
    "a tag": (lambda f: (f / CONFIG).write_text("a: !!python/object/apply:os.system [id]\n"), "YAML tag"),
}  # fmt: skip


@pytest.mark.parametrize("what", ARCHIVES)
def test_a_hostile_nemo_file_is_refused(good: dict[str, Path], tmp_path: Path, what: str) -> None:
    change, message = ARCHIVES[what]
    path = repack(good["nemo"], tmp_path / "x.nemo", change)
    refusal = try_source(".nemo file", tmp_path, path)
    assert re.search(message, refusal), refusal


@pytest.mark.parametrize("member", [CONFIG, f"{'0' * 32}_tokenizer.json", WEIGHTS])
def test_what_a_small_file_unpacks_to_is_known_before_it_is_written(
    good: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, member: str
) -> None:
    """1 GiB of zeros in 1 MB of gzip: refused by the header alone."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    with tarfile.open(good["nemo"]) as archive:
        names = [name for name in archive.getnames() if name.startswith("./")]
        found = {name.removeprefix("./"): archive.extractfile(name).read() for name in names}
    path = tmp_path / "bomb.nemo"
    with gzip.open(path, "wb", compresslevel=1) as packed:
        for name in sorted(found):
            size = 1 << 30 if name == member else len(found[name])
            info = tarfile.TarInfo(name)
            info.size = size
            packed.write(info.tobuf(tarfile.USTAR_FORMAT))
            if name == member:
                for _ in range(16):
                    packed.write(bytes(1 << 20))
                break
            packed.write(found[name] + bytes(-size % 512))
    assert re.search(r"\): has 1,073,741,824 bytes; expected", try_source(".nemo file", tmp_path, path))
    assert list((tmp_path / "scratch").iterdir()) == []


@given(data=st.data())
@FUZZ
def test_changed_configurations_of_archives_are_read_or_refused(
    good: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    box = tmp_path_factory.mktemp("made")

    def change(folder: Path) -> None:
        made = data.draw(changed(yaml.safe_load((folder / CONFIG).read_text())))
        (folder / CONFIG).write_text(yaml.safe_dump(made))

    try_source(".nemo file", box, repack(good["nemo"], box / "x.nemo", change))


@given(data=st.data(), part=st.sampled_from(["archive", "pickle"]))
@FUZZ
def test_damaged_archives_are_read_or_refused(
    good: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, part: str
) -> None:
    box = tmp_path_factory.mktemp("made")
    if part == "archive":
        (box / "x.nemo").write_bytes(data.draw(damaged(good["nemo"].read_bytes())))
    else:
        repack(good["nemo"], box / "x.nemo", pickled(lambda raw: data.draw(damaged(raw))))
    try_source(".nemo file", box, box / "x.nemo")


# GGUF files


def gguf_header(version: int = 3, tensors: int = 0, pairs: int = 0, rest: bytes = b"") -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", version, tensors, pairs) + rest


def text(value: bytes, size: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if size is None else size) + value


GGUF_FILES: dict[str, bytes] = {
    "nothing": b"",
    "another magic": b"GGML" + bytes(60),
    "another version": gguf_header(version=99),
    "the other byte order": struct.pack(">4sIQQ", b"GGUF", 3, 0, 0),
    "no pairs": gguf_header(),
    "pairs without end": gguf_header(pairs=2**63),
    "tensors without end": gguf_header(tensors=2**63),
    "a key without end": gguf_header(pairs=1, rest=text(b"x", 2**63)),
    "a key cut off": gguf_header(pairs=1, rest=text(b"x", 1000)),
    "a value of no type": gguf_header(pairs=1, rest=text(b"x") + struct.pack("<I", 77)),
    "an array without end": gguf_header(pairs=1, rest=text(b"x") + struct.pack("<IIQ", 9, 0, 2**60)),
    "an array of texts without end": gguf_header(pairs=1, rest=text(b"x") + struct.pack("<IIQ", 9, 8, 2**60)),
    "an array of arrays": gguf_header(pairs=1, rest=text(b"x") + struct.pack("<IIQ", 9, 9, 10)),
    "an array of a million": gguf_header(pairs=1, rest=text(b"x") + struct.pack("<IIQ", 9, 0, 10**6)),
    "an alignment of none": gguf_header(pairs=1, rest=text(b"general.alignment") + struct.pack("<II", 4, 0)),
    "a tensor of many dimensions": gguf_header(tensors=1, rest=text(b"x") + struct.pack("<I", 2**31)),
    "a tensor of no type": gguf_header(tensors=1, rest=text(b"x") + struct.pack("<IQIQ", 1, 4, 99, 0)),
    "a tensor over all bounds": gguf_header(tensors=1, rest=text(b"x") + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0)),
    "a tensor outside": gguf_header(tensors=1, rest=text(b"x") + struct.pack("<IQIQ", 1, 4, 0, 2**62)),
}


@pytest.mark.parametrize("what", GGUF_FILES)
def test_a_hostile_gguf_file_is_refused(good: dict[str, Path], tmp_path: Path, what: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(GGUF_FILES[what])
    assert "x.gguf" in attempt("GGUF file", tmp_path, lambda: load_gguf(path))


@given(data=st.data())
@FUZZ
def test_damaged_gguf_files_are_read_or_refused(
    good: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    box = tmp_path_factory.mktemp("made")
    (box / "x.gguf").write_bytes(
        data.draw(damaged(good["gguf"].read_bytes(), data.draw(st.sampled_from([200, 1500, 20_000]))))
    )
    attempt("GGUF file", box, lambda: load_gguf(box / "x.gguf"))
