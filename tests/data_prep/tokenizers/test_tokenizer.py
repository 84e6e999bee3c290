"""One interface to all tokenizers, and building them once into a run's folder."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from data_prep.tokenizers.tokenizer import Tokenizer, build_tokenizer
from data_prep.tokenizers.tokenizer_libraries import PROBES
from yxanul_nemo.config.data import TokenizerConfig
from yxanul_nemo.errors import UserError

DOCUMENTS = list(topics.values())
EOS, PAD = "<|endoftext|>", "<|padding|>"
HARD_TEXTS = [*PROBES, *DOCUMENTS[:10], "", " ", f"{EOS}{PAD} and {EOS}", "\u0130\u00df\ud7ff\ue000", "7" * 2000]
ROOT = Path(__file__).resolve().parents[3]


def documents():
    return iter(DOCUMENTS)


def never():
    raise AssertionError("no training text is needed here")


def superbpe_config(**changes) -> TokenizerConfig:
    values = {"name": "small", "kind": "train_superbpe", "vocab_size": 1200, "transition": 800, "pad_token": PAD}
    return TokenizerConfig(**(values | changes))


@pytest.fixture(scope="module")
def superbpe_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "tokenizer"
    build_tokenizer(superbpe_config(), folder, documents)
    return folder


@pytest.fixture(scope="module")
def sentencepiece_models(tmp_path_factory) -> dict[str, Path]:
    """A lossless BPE model and a normalizing UNIGRAM model."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    lossless = {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "byte_fallback": True,
    }
    lines = [line for text in DOCUMENTS for line in text.split("\n")]
    for name, options in {"bpe": {"model_type": "bpe", **lossless}, "unigram": {"model_type": "unigram"}}.items():
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_prefix=str(folder / name), vocab_size=900, minloglevel=2, **options
        )
    return {name: folder / f"{name}.model" for name in ("bpe", "unigram")}


def build_all(folder: Path, models: dict[str, Path]) -> dict[str, Tokenizer]:
    """A tokenizer of each kind, in subfolders of `folder`."""
    superbpe = build_tokenizer(superbpe_config(), folder / "train_superbpe", documents)
    configs = {
        "train_bpe": TokenizerConfig(name="b", kind="train_bpe", vocab_size=900),
        "huggingface": TokenizerConfig(name="h", kind="huggingface", path=folder / "train_superbpe", pad_token=PAD),
        "superbpe": TokenizerConfig(name="s", kind="superbpe", path=as_superbpe_files(folder), pad_token=PAD),
        "sentencepiece": TokenizerConfig(name="p", kind="sentencepiece", path=models["bpe"], eos_token="</s>"),
    }
    built = {name: build_tokenizer(config, folder / name, documents) for name, config in configs.items()}
    return {"train_superbpe": superbpe, **built}


def as_superbpe_files(folder: Path) -> Path:
    """The trained tokenizer again, as vocab.json, merges.txt and added_tokens.json."""
    model = json.loads((folder / "train_superbpe" / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    files = folder / "files"
    files.mkdir()
    (files / "vocab.json").write_text(json.dumps(model["vocab"]))
    (files / "merges.txt").write_text("".join(f"{left} {right}\n" for left, right in model["merges"]), encoding="utf-8")
    (files / "added_tokens.json").write_text(json.dumps({EOS: 1198, PAD: 1199}))
    return files


@pytest.fixture(scope="module")
def all_kinds(tmp_path_factory, sentencepiece_models) -> tuple[Path, dict[str, Tokenizer]]:
    folder = tmp_path_factory.mktemp("all")
    return folder, build_all(folder, sentencepiece_models)


KINDS = ["train_superbpe", "train_bpe", "huggingface", "superbpe", "sentencepiece"]


@pytest.mark.parametrize("kind", KINDS)
def test_text_comes_back(all_kinds, kind):
    tokenizer = all_kinds[1][kind]
    for text, ids in zip(HARD_TEXTS, tokenizer.encode_batch(HARD_TEXTS), strict=True):
        assert ids.dtype == np.int32
        assert np.array_equal(ids, tokenizer.encode(text))
        assert tokenizer.decode(ids) == text
        assert not np.isin([tokenizer.eos_id, tokenizer.pad_id], ids).any()


@pytest.mark.parametrize("kind", KINDS)
def test_any_text_comes_back(all_kinds, kind):
    tokenizer = all_kinds[1][kind]

    @settings(max_examples=100, deadline=None)
    @given(st.text())
    def round_trip(text):
        # Sentencepiece writes a space as U+2581.
        if kind != "sentencepiece" or "\u2581" not in text:
            assert tokenizer.decode(tokenizer.encode(text)) == text

    round_trip()


@pytest.mark.parametrize("kind", KINDS)
def test_loading_gives_the_same(all_kinds, kind):
    folder, built = all_kinds
    loaded = Tokenizer.load(folder / kind)
    for name in ("fingerprint", "vocab_size", "eos_id", "pad_id", "eos_token", "pad_token", "library"):
        assert getattr(loaded, name) == getattr(built[kind], name), name
    assert json.loads((folder / kind / "fingerprint.json").read_text())["fingerprint"] == loaded.fingerprint


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_give_the_same_ids(all_kinds, kind):
    from transformers import AutoTokenizer

    folder, built = all_kinds
    ours, theirs = built[kind], AutoTokenizer.from_pretrained(folder / kind)
    for text, ids in zip(HARD_TEXTS, ours.encode_batch(HARD_TEXTS), strict=True):
        assert theirs(text)["input_ids"] == ids.tolist()
        assert theirs.decode(ids.tolist()) == text
    assert theirs.eos_token_id == ours.eos_id
    assert theirs.pad_token_id == (None if ours.pad_token is None else ours.pad_id)
    assert len(theirs) == ours.vocab_size
    # Further inputs, as token types, would be refused by a Llama's `generate`.
    assert set(theirs("text")) == {"input_ids", "attention_mask"} == set(theirs.model_input_names)


def test_transformers_give_the_same_ids_beside_a_llama_config(superbpe_folder, tmp_path):
    from transformers import AutoTokenizer, LlamaConfig

    tokenizer = Tokenizer.load(superbpe_folder)
    tokenizer.save(tmp_path)
    LlamaConfig(vocab_size=tokenizer.vocab_size).save_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in HARD_TEXTS:
        assert theirs(text)["input_ids"] == tokenizer.encode(text).tolist()


def test_ids_of_special_tokens(all_kinds):
    built = all_kinds[1]
    assert (built["train_superbpe"].vocab_size, built["train_superbpe"].eos_id, built["train_superbpe"].pad_id) == (
        1200,
        1198,
        1199,
    )
    assert built["train_bpe"].pad_id == built["train_bpe"].eos_id == 899
    assert (
        built["sentencepiece"].eos_id
        == sentencepiece.SentencePieceProcessor(
            model_file=str(all_kinds[0] / "sentencepiece" / "tokenizer.model")
        ).eos_id()
    )
    assert built["train_superbpe"].decode([1198, *built["train_superbpe"].encode("of the")]) == f"{EOS}of the"


def test_the_same_tokenizer_has_one_fingerprint_however_it_came(all_kinds):
    built = all_kinds[1]
    assert built["superbpe"].fingerprint == built["huggingface"].fingerprint == built["train_superbpe"].fingerprint


def test_layout_does_not_change_the_fingerprint(superbpe_folder, tmp_path):
    path = superbpe_folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["vocab"] = dict(reversed(content["model"]["vocab"].items()))
    content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content, indent=4), encoding="utf-8")
    assert Tokenizer.load(tmp_path, EOS, PAD).fingerprint == Tokenizer.load(superbpe_folder).fingerprint


def swap_merges(content: dict) -> None:
    merges = content["model"]["merges"]
    merges[100], merges[101] = merges[101], merges[100]


def swap_ids(content: dict) -> None:
    vocab = content["model"]["vocab"]
    first, second = list(vocab)[300:302]
    vocab[first], vocab[second] = vocab[second], vocab[first]


def split_words(content: dict) -> None:
    content["pre_tokenizer"]["pretokenizers"][-1]["use_regex"] = True


def lowercase(content: dict) -> None:
    content["normalizer"] = {"type": "Lowercase"}


def another_special(content: dict) -> None:
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 1200, "content": "<|more|>"})


def other_decoder(content: dict) -> None:
    content["decoder"] = None


@pytest.mark.parametrize("change", [swap_merges, swap_ids, split_words, lowercase, another_special, other_decoder])
def test_any_change_of_content_changes_the_fingerprint(superbpe_folder, tmp_path, change):
    content = json.loads((superbpe_folder / "tokenizer.json").read_text(encoding="utf-8"))
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert Tokenizer.load(tmp_path, EOS, PAD).fingerprint != Tokenizer.load(superbpe_folder).fingerprint


def test_special_tokens_are_part_of_the_fingerprint(superbpe_folder):
    assert Tokenizer.load(superbpe_folder, PAD, EOS).fingerprint != Tokenizer.load(superbpe_folder).fingerprint


def test_a_template_that_adds_tokens_is_not_applied(superbpe_folder, tmp_path):
    library = tokenizers.Tokenizer.from_file(str(superbpe_folder / "tokenizer.json"))
    library.post_processor = processors.TemplateProcessing(single=f"{EOS} $A", special_tokens=[(EOS, 1198)])
    library.enable_truncation(5)
    library.save(str(tmp_path / "tokenizer.json"))
    loaded, plain = Tokenizer.load(tmp_path, EOS, PAD), Tokenizer.load(superbpe_folder)
    assert np.array_equal(loaded.encode(DOCUMENTS[0]), plain.encode(DOCUMENTS[0]))
    assert loaded.fingerprint == plain.fingerprint


def test_threads_share_a_tokenizer(superbpe_folder):
    tokenizer = Tokenizer.load(superbpe_folder)
    expected = [ids.tolist() for ids in tokenizer.encode_batch(DOCUMENTS)]
    results: dict[int, list] = {}

    def work(number: int) -> None:
        results[number] = [tokenizer.encode(text).tolist() for text in DOCUMENTS]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[number] for number in range(4)] == [expected] * 4


def test_built_once(superbpe_folder):
    stamps = {file: file.stat().st_mtime_ns for file in superbpe_folder.iterdir()}
    build_tokenizer(superbpe_config(name="another name"), superbpe_folder, never)
    assert {file: file.stat().st_mtime_ns for file in superbpe_folder.iterdir()} == stamps


def test_concurrent_builders_build_once(tmp_path):
    readings = []

    def texts():
        readings.append(1)
        return documents()

    config = TokenizerConfig(name="b", kind="train_bpe", vocab_size=600)
    made = []
    builders = [
        threading.Thread(target=lambda: made.append(build_tokenizer(config, tmp_path / "tokenizer", texts)))
        for _ in range(3)
    ]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert len(readings) == 1
    assert len({tokenizer.fingerprint for tokenizer in made}) == 1 == len({len(made)} - {0})


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"vocab_size": 1300}, "tokenizer.vocab_size=1200 there, 1300 asked for"),
        ({"transition": 700}, "tokenizer.transition=800 there, 700 asked for"),
        ({"max_words_per_token": 3}, "tokenizer.max_words_per_token=4 there, 3 asked for"),
        ({"cross_newline": True}, "tokenizer.cross_newline=False there, True asked for"),
        ({"cross_colon": True}, "tokenizer.cross_colon=False there, True asked for"),
        ({"pad_token": None}, "tokenizer.pad_token=<|padding|> there, None asked for"),
        ({"kind": "train_bpe"}, "tokenizer.kind=train_superbpe there, train_bpe asked for"),
    ],
)
def test_other_settings_are_refused(superbpe_folder, changes, difference):
    before = {file.name: file.read_bytes() for file in superbpe_folder.iterdir()}
    with pytest.raises(UserError) as caught:
        build_tokenizer(superbpe_config(**changes), superbpe_folder, never)
    assert difference in str(caught.value) and "run.dir" in caught.value.fix
    assert {file.name: file.read_bytes() for file in superbpe_folder.iterdir()} == before


def test_a_tokenizer_built_before_a_setting_was_there_is_taken(superbpe_folder, tmp_path):
    folder = shutil.copytree(superbpe_folder, tmp_path / "older")
    record = json.loads((folder / "fingerprint.json").read_text())
    del record["settings"]["cross_newline"], record["settings"]["cross_colon"]
    (folder / "fingerprint.json").write_text(json.dumps(record))
    assert build_tokenizer(superbpe_config(), folder, never).fingerprint == record["fingerprint"]
    with pytest.raises(UserError, match="cross_colon=False there, True asked for"):
        build_tokenizer(superbpe_config(cross_colon=True), folder, never)


def test_changed_source_is_refused_and_a_moved_one_is_not(all_kinds, tmp_path):
    source = tmp_path / "source"
    Tokenizer.load(all_kinds[0] / "train_bpe").save(source)
    config = TokenizerConfig(name="h", kind="huggingface", path=source)
    build_tokenizer(config, tmp_path / "tokenizer", never)
    moved = source.rename(tmp_path / "moved")
    build_tokenizer(config, tmp_path / "tokenizer", never)
    build_tokenizer(config.model_copy(update={"path": moved}), tmp_path / "tokenizer", never)
    content = json.loads((moved / "tokenizer.json").read_text(encoding="utf-8"))
    swap_merges(content)
    (moved / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=r"built from other files than .* has now: tokenizer\.json"):
        build_tokenizer(config.model_copy(update={"path": moved}), tmp_path / "tokenizer", never)


def test_damage_is_noticed(superbpe_folder, tmp_path):
    folder = tmp_path / "tokenizer"
    build_tokenizer(superbpe_config(), folder, documents)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    swap_merges(content)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match="do not match their fingerprint"):
        build_tokenizer(superbpe_config(), folder, never)
    (folder / "tokenizer.json").write_text('{"version"')
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer\.json"):
        build_tokenizer(superbpe_config(), folder, never)


DAMAGED_JSON = [
    b"", b"{", b"null", b"[]", b"7", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"library": "pickle"}', b'{"library": 7}',
    b'{"library": ["tokenizers"]}', b"{}",
]  # fmt: skip


@pytest.mark.parametrize("raw", DAMAGED_JSON)
def test_a_damaged_record_is_named(superbpe_folder, tmp_path, raw):
    folder = tmp_path / "tokenizer"
    shutil.copytree(superbpe_folder, folder)
    (folder / "fingerprint.json").write_bytes(raw)
    with pytest.raises(UserError, match=r"fingerprint\.json: "):
        Tokenizer.load(folder)
    with pytest.raises(UserError, match=r"fingerprint\.json: "):
        build_tokenizer(superbpe_config(), folder, never)


@pytest.mark.parametrize("key", ["fingerprint", "eos_token", "pad_token", "settings", "source"])
@pytest.mark.parametrize("value", [7, [7], [["x", 1]]])
def test_a_record_with_a_value_of_another_type_is_named(superbpe_folder, tmp_path, key, value):
    folder = tmp_path / "tokenizer"
    shutil.copytree(superbpe_folder, folder)
    record = json.loads((folder / "fingerprint.json").read_text(encoding="utf-8"))
    (folder / "fingerprint.json").write_text(json.dumps(record | {key: value}))
    with pytest.raises(UserError, match=r"fingerprint\.json: is not the record"):
        build_tokenizer(superbpe_config(), folder, never)


@pytest.mark.parametrize("name", ["special_tokens_map.json", "tokenizer_config.json"])
@pytest.mark.parametrize("raw", DAMAGED_JSON[:8])
def test_damaged_files_beside_a_tokenizer_are_named(superbpe_folder, tmp_path, name, raw):
    folder = tmp_path / "tokenizer"
    shutil.copytree(superbpe_folder, folder)
    (folder / name).write_bytes(raw)
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        Tokenizer.load(folder)


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds files but no fingerprint\.json"):
        build_tokenizer(superbpe_config(), tmp_path, never)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_a_saved_copy_is_not_a_run_s_own(superbpe_folder, tmp_path):
    Tokenizer.load(superbpe_folder).save(tmp_path)
    with pytest.raises(UserError, match="is not the record of a tokenizer built for a run"):
        build_tokenizer(superbpe_config(), tmp_path, never)


def test_a_finished_folder_needs_no_lock(superbpe_folder, tmp_path):
    copy = tmp_path / "tokenizer"
    shutil.copytree(superbpe_folder, copy)
    build_tokenizer(superbpe_config(), copy, never)
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer"]


def test_a_build_that_was_killed_is_done_again(tmp_path):
    config = TokenizerConfig(name="b", kind="train_bpe", vocab_size=600)
    half_done = tmp_path / ".tokenizer.tmp"
    half_done.mkdir()
    (half_done / "tokenizer.json").write_text('{"half":')

    def breaks():
        yield from DOCUMENTS[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_tokenizer(config, tmp_path / "tokenizer", breaks)
    assert not (tmp_path / "tokenizer").exists()
    made = build_tokenizer(config, tmp_path / "tokenizer", documents)
    assert Tokenizer.load(tmp_path / "tokenizer").fingerprint == made.fingerprint
    assert not half_done.exists()


def test_the_hub_without_network(tmp_path):
    script = (
        "from pathlib import Path\nfrom data_prep.tokenizers.tokenizer import build_tokenizer\n"
        "from yxanul_nemo.config.data import TokenizerConfig\nfrom yxanul_nemo.errors import UserError\n"
        "try:\n    build_tokenizer(TokenizerConfig(name='h', kind='superbpe', hub_id='someone/something'),"
        f" Path({str(tmp_path / 'tokenizer')!r}), None)\n"
        "except UserError as error:\n    print(error)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.startswith("tokenizer.hub_id: someone/something cannot be fetched")
    assert "set tokenizer.path" in run.stdout
    assert not (tmp_path / "tokenizer").exists()


@pytest.mark.parametrize(
    ("kind", "source", "changes", "message"),
    [
        ("huggingface", "bpe", {"eos_token": "</s>"}, "set tokenizer.kind=sentencepiece"),
        ("sentencepiece", "train_bpe", {}, "set tokenizer.kind=huggingface"),
        ("huggingface", "files", {}, "set tokenizer.kind=superbpe"),
        ("huggingface", "nowhere", {}, "no such file or folder"),
        (
            "huggingface",
            "train_bpe",
            {"eos_token": "</s>"},
            f"has no token '</s>'; expected a token of this tokenizer as tokenizer.eos_token. It has {EOS}.",
        ),
        (
            "sentencepiece",
            "bpe",
            {},
            f"has no token '{EOS}'; expected a token of this tokenizer as tokenizer.eos_token. It has </s>, <s>.",
        ),
        ("superbpe", "train_bpe", {"pad_token": "[PAD]"}, "has no token '[PAD]'"),
    ],
)
def test_sources_that_do_not_fit_are_refused(all_kinds, sentencepiece_models, tmp_path, kind, source, changes, message):
    path = sentencepiece_models.get(source, all_kinds[0] / source)
    config = TokenizerConfig(**({"name": "x", "kind": kind, "path": path} | changes))
    with pytest.raises(UserError) as caught:
        build_tokenizer(config, tmp_path / "tokenizer", never)
    assert message in str(caught.value)
    assert not (tmp_path / "tokenizer").exists()


def test_a_normalizing_tokenizer_is_announced(sentencepiece_models, tmp_path, caplog):
    config = TokenizerConfig(name="u", kind="sentencepiece", path=sentencepiece_models["unigram"], eos_token="</s>")
    tokenizer = build_tokenizer(config, tmp_path / "tokenizer", never)
    assert not tokenizer.is_lossless()
    assert "normalizes text" in caplog.text
    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_models["unigram"]))
    assert [ids.tolist() for ids in tokenizer.encode_batch(DOCUMENTS)] == reference.encode(DOCUMENTS)


def test_what_is_no_tokenizer_is_refused(tmp_path):
    (tmp_path / "broken.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"broken\.model: not a sentencepiece model"):
        Tokenizer.load(tmp_path / "broken.model", "</s>")
    with pytest.raises(UserError, match=r"broken\.model: not a sentencepiece model"):
        Tokenizer.load(tmp_path, "</s>")


def test_a_folder_that_names_no_end_of_document(superbpe_folder, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((superbpe_folder / "tokenizer.json").read_bytes())
    with pytest.raises(UserError, match=r"Set tokenizer\.eos_token"):
        Tokenizer.load(tmp_path)
    described = {"eos_token": {"content": EOS, "lstrip": False}, "pad_token": None}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(described))
    assert Tokenizer.load(tmp_path).eos_id == 1198
