"""tokenizer.json and sentencepiece files by somebody else: read or refused, never a crash, a hang or a full memory."""

import base64
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as proto

from data_prep.tokenizers.charsmap import charsmap_growth
from data_prep.tokenizers.pattern_checks import pattern_problem
from data_prep.tokenizers.superbpe_rules import GROUPS_OF_THREE
from data_prep.tokenizers.tokenizer import Tokenizer
from data_prep.tokenizers.tokenizer_libraries import PROBES, SentencePieceLibrary
from tests.hostile import attempt, changed, damaged

TEXTS = [*PROBES, "The the thee " * 50, "e" * 500, "1234567890" * 50, "(" * 200 + "a" * 300]
FUZZ = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def good(tokenizer_folder: Path) -> dict[str, Any]:
    return json.loads((tokenizer_folder / "tokenizer.json").read_text())


def use(folder: Path) -> None:
    """All that is done with a tokenizer."""
    tokenizer = Tokenizer.load(folder)
    for text in TEXTS:
        tokenizer.decode(tokenizer.encode(text))
    assert tokenizer.fingerprint and 0 <= tokenizer.eos_id < tokenizer.vocab_size < 2**31


def try_json(folder: Path, described: object) -> str:
    (folder / "tokenizer.json").write_text(json.dumps(described))
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|endoftext|>"}')
    return attempt("tokenizer.json", folder, lambda: use(folder))


def replace(pattern: dict[str, str], content: str) -> dict:
    return {"type": "Replace", "pattern": pattern, "content": content}


def split(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def sequence(*rules: dict) -> dict:
    return {"type": "Sequence", "normalizers": list(rules)}


def nested(rule: dict, depth: int) -> dict:
    for _ in range(depth):
        rule = sequence(rule)
    return rule


MANY = "e" * 60
HOSTILE: dict[str, tuple[Callable[[dict], object], str]] = {
    "nested replacements": (lambda d: d.update(normalizer=sequence(*[replace({"String": "e"}, MANY)] * 5)), "times as long"),
    "replacement of nothing": (lambda d: d.update(normalizer=sequence(*[replace({"Regex": ""}, MANY)] * 2)), "times as long"),
    "replacement of an empty text": (lambda d: d.update(normalizer=replace({"String": ""}, "x")), "without a pattern"),
    "long replacement": (lambda d: d.update(normalizer=replace({"String": "e"}, "e" * 10**6)), "another content"),
    "many ByteLevels": (lambda d: d.update(normalizer=sequence(*[{"type": "ByteLevel"}] * 30)), "times as long"),
    "many Prepends": (lambda d: d.update(normalizer=sequence(*[{"type": "Prepend", "prepend": MANY}] * 60)), "times as long"),
    "long Prepend": (lambda d: d.update(normalizer={"type": "Prepend", "prepend": "x" * 10**6}), "another prepend"),
    "deep normalizer": (lambda d: d.update(normalizer=nested({"type": "NFC"}, 60)), "levels"),
    "wide normalizer": (lambda d: d.update(normalizer=sequence(*[{"type": "Strip"}] * 100)), "more than 64 parts"),
    "Sequence of nothing": (lambda d: d.update(normalizer={"type": "Sequence"}), "without normalizers"),
    "normalizer without a type": (lambda d: d.update(normalizer={"pattern": {"String": "e"}, "content": MANY}), "type 'None'"),
    "normalizer that is a text": (lambda d: d.update(normalizer="Replace"), "type 'None'"),
    "unknown normalizer": (lambda d: d.update(normalizer={"type": "Python", "name": "os.system"}), "type 'Python'"),
    "unknown pre-tokenizer": (lambda d: d.update(pre_tokenizer={"type": "FixedLength", "length": 0}), "type 'FixedLength'"),
    "unknown decoder": (lambda d: d.update(decoder={"type": "CTC", "pad_token": "", "cleanup": True}), "type 'CTC'"),
    "decoder that replaces": (
        lambda d: d.update(decoder={"type": "Sequence", "decoders": [replace({"String": "e"}, MANY)] * 5}), "decoder makes a text"
    ),
    "decoder that strips": (lambda d: d.update(decoder={"type": "Strip", "content": " ", "start": 2**63, "stop": 0}), "start="),
    "junk Precompiled": (lambda d: d.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}), "is damaged"),
    "Precompiled outside": (
        lambda d: d.update(normalizer={"type": "Precompiled", "precompiled_charsmap": base64.b64encode(OUTSIDE).decode()}), "is damaged"
    ),
    "Precompiled of a number": (lambda d: d.update(normalizer={"type": "Precompiled", "precompiled_charsmap": 3}), "is damaged"),
    "exponential pattern": (lambda d: d.update(pre_tokenizer=split("(a+)+$")), "in several ways"),
    "exponential alternatives": (lambda d: d.update(pre_tokenizer=split(r"(?:a|a)*b")), "in several ways"),
    "pattern with references": (lambda d: d.update(pre_tokenizer=split(r"(a*)\1*")), "its own groups"),
    "pattern that grows": (lambda d: d.update(pre_tokenizer=split("(?:(?:a{999}){999}){999}")), "repeats more than"),
    "pattern that calls itself": (lambda d: d.update(pre_tokenizer=split(r"(?<x>a\g<x>?b)")), "plain one|its own groups"),
    "broken pattern": (lambda d: d.update(pre_tokenizer=split("(")), "not a tokenizer that can be read"),
    "long pattern": (lambda d: d.update(pre_tokenizer=split("a" * 10**5)), "more than 8192"),
    "no model": (lambda d: d.pop("model"), "has no model"),
    "unknown model": (lambda d: d["model"].update(type="Python"), "type 'Python'"),
    "id over all bounds": (lambda d: d["model"]["vocab"].update(zzz=2**32 - 1), "the token 'zzz'"),
    "negative id": (lambda d: d["model"]["vocab"].update(zzz=-1), "the token 'zzz'"),
    "long token": (lambda d: d["model"]["vocab"].update({"z" * 10**5: 299}), "the token 'zzz"),
    "merge of strangers": (lambda d: d["model"]["merges"].append(["\u4f60", "\u597d"]), "not a tokenizer that can be read"),
    "merges that are a text": (lambda d: d["model"].update(merges="a b"), "without merges"),
    "prefix that is cut off": (lambda d: d["model"].update(continuing_subword_prefix="\u4f60" * 9), "second half lacks"),
    "unknown unk_token": (lambda d: d["model"].update(unk_token="<what>"), "not in its vocab"),
    "random merges": (lambda d: d["model"].update(dropout=0.5), "ids are random"),
    "empty added token": (lambda d: d["added_tokens"][0].update(content=""), "the added token"),
    "added token of no id": (lambda d: d["added_tokens"][0].update(id=-5), "the added token"),
    "added tokens that are a number": (lambda d: d.update(added_tokens=7), "no list"),
    "scores that are no numbers": (lambda d: d.update(model=unigram(("a", float("nan")))), "piece and its score"),
    "scores over all bounds": (lambda d: d.update(model=unigram(("a", 1e308))), "piece and its score"),
    "empty piece": (lambda d: d.update(model=unigram(("", -1.0))), "piece and its score"),
    "unknown piece outside": (lambda d: d.update(model=unigram(("a", -1.0)) | {"unk_id": 99}), "unk_id=99"),
    "a word of any length": (
        lambda d: d.update(model={
            "type": "WordPiece", "vocab": {"a": 0}, "unk_token": "a", "continuing_subword_prefix": "", "max_input_chars_per_word": 10**12,
        }),
        "max_input_chars_per_word",
    ),
    "a template of strangers": (
        lambda d: d.update(post_processor={"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {"x": 1}}), "read"
    ),
}  # fmt: skip
OUTSIDE = struct.pack("<I", 1024) + struct.pack("<256I", *[0xFFFFFFFF] * 256) + b"x\0"


def unigram(*pieces: tuple[str, float]) -> dict:
    return {"type": "Unigram", "unk_id": 0, "byte_fallback": False, "vocab": [["<unk>", 0.0], *map(list, pieces)]}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_tokenizer_is_refused(good: dict, tmp_path: Path, what: str) -> None:
    change, message = HOSTILE[what]
    described = json.loads(json.dumps(good))
    change(described)
    refusal = try_json(tmp_path, described)
    assert "tokenizer.json" in refusal and re.search(message, refusal), refusal


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"model": ' * 5000,
        b'{"model": {}, "model": {}}',
        b'{"a":' + b"9" * 5000 + b"}",
    ],
)
def test_what_is_no_json_object_is_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(raw)
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<|endoftext|>"}')
    assert attempt("tokenizer.json", tmp_path, lambda: use(tmp_path))


def test_no_part_can_be_given_twice(good: dict, tmp_path: Path) -> None:
    """Python takes the last of two values and the library, where the last is null, the first."""
    text = json.dumps(good)
    hidden = json.dumps(sequence(*[replace({"String": "e"}, MANY)] * 5))
    (tmp_path / "tokenizer.json").write_text(f'{{"normalizer": {hidden}, ' + text[1:])
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<|endoftext|>"}')
    assert "'normalizer' is there twice" in attempt("tokenizer.json", tmp_path, lambda: use(tmp_path))


@given(data=st.data())
@FUZZ
def test_changed_tokenizers_are_read_or_refused(
    good: dict, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    vocab, merges = good["model"]["vocab"], good["model"]["merges"]
    # Changes should meet the rules rather than one of many tokens.
    short = good | {"model": good["model"] | {"vocab": dict(list(vocab.items())[:6]), "merges": []}}
    made = data.draw(changed(short))
    if (
        isinstance(made.get("model"), dict)
        and isinstance(made["model"].get("vocab"), dict)
        and made["model"].get("merges") == []
    ):
        made["model"] = made["model"] | {"vocab": vocab | made["model"]["vocab"], "merges": merges}
    try_json(tmp_path_factory.mktemp("made"), made)


@pytest.mark.parametrize(
    "pattern",
    [
        # GPT-2, GPT-4, GPT-4o, Llama 3, Qwen 2, DeepSeek, BLOOM, StarCoder, SuperBPE
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}|\s+",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
        " ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+",
        r"\p{N}{1,510}",
        GROUPS_OF_THREE,
        r"[]a]+|[^]a]+",
    ],
)
def test_patterns_of_known_tokenizers_are_taken(pattern: str) -> None:
    assert pattern_problem(pattern) == ""


@pytest.mark.parametrize(
    "pattern", ["(a*)*", "(a+)+", "(?:a?){30}", r"(\s*\w+)+", "(a|b)+", "((a)+b)*", r"(?:[^]]*)+", "((a{2,3})b){2,}"]
)
def test_patterns_that_match_in_several_ways_are_refused(pattern: str) -> None:
    assert pattern_problem(pattern)


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
SPACES = replace({"String": " "}, "\u2581")
KNOWN_RULES: dict[str, dict[str, Any]] = {
    "Llama 2": {
        "normalizer": sequence({"type": "Prepend", "prepend": "\u2581"}, SPACES),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                replace({"String": "\u2581"}, " "), {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
    },
    "Llama 3": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split(r"\p{N}{1,3}"), BYTE_LEVEL]}, "decoder": BYTE_LEVEL},
    "Qwen 2": {"normalizer": {"type": "NFC"}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split(r"\s+"), BYTE_LEVEL]}},
    "T5": {
        "normalizer": sequence({"type": "Strip", "strip_left": False, "strip_right": True}, replace({"Regex": " {2,}"}, "\u2581")),
        "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
        "decoder": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
    },
    "BERT": {
        "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "lowercase": True},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
    },
    "SuperBPE": {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": False}, split(r"(?=(\d{3})+(?!\d))"), BYTE_LEVEL],
        },
        "decoder": BYTE_LEVEL,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN_RULES)
def test_rules_of_known_tokenizers_are_taken(good: dict, tmp_path: Path, name: str) -> None:
    assert try_json(tmp_path, good | KNOWN_RULES[name]) == ""


# sentencepiece


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Models of both types with sentencepiece's own table of characters (NFKC)."""
    folder = tmp_path_factory.mktemp("spm")
    (folder / "text").write_text(
        "\n".join(f"the list of {i} functions returns number {i * i}, or nothing" for i in range(300))
    )
    for kind in ("bpe", "unigram"):
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / "text"), model_prefix=str(folder / kind), model_type=kind, vocab_size=300, byte_fallback=True,
            minloglevel=2,
        )  # fmt: skip
    return {kind: (folder / f"{kind}.model").read_bytes() for kind in ("bpe", "unigram")}


def try_model(folder: Path, raw: bytes) -> str:
    (folder / "spm.model").write_bytes(raw)

    def use_model() -> None:
        library = SentencePieceLibrary(folder / "spm.model")
        for text in TEXTS:
            library.decode(library.encode_batch([text])[0].tolist())
        assert library.rules()

    return attempt("sentencepiece", folder, use_model)


def test_the_table_of_characters_is_measured(trained: dict[str, bytes]) -> None:
    """NFKC makes 18 characters (33 bytes in UTF-8) of U+FDFA (3 bytes): Unicode's longest."""
    charsmap = proto.ModelProto.FromString(trained["bpe"]).normalizer_spec.precompiled_charsmap
    assert charsmap_growth(charsmap) == pytest.approx(11)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_good_sentencepiece_model_is_read(trained: dict[str, bytes], tmp_path: Path, kind: str) -> None:
    assert try_model(tmp_path, trained[kind]) == ""


def with_charsmap(model: proto.ModelProto, charsmap: bytes) -> None:
    model.normalizer_spec.precompiled_charsmap = charsmap


def with_units(model: proto.ModelProto, unit: int) -> None:
    old = model.normalizer_spec.precompiled_charsmap
    size_bytes = int.from_bytes(old[:4], "little")
    with_charsmap(model, old[:4] + struct.pack("<I", unit) * (size_bytes // 4) + old[4 + size_bytes :])


HOSTILE_MODELS: dict[str, Callable[[proto.ModelProto], object]] = {
    "table cut off": lambda m: with_charsmap(m, m.normalizer_spec.precompiled_charsmap[:5000]),
    "table of no size": lambda m: with_charsmap(m, b"\0\0\0\0"),
    "table over all bounds": lambda m: with_charsmap(m, b"\xff" * 64),
    "table that leads outside": lambda m: with_units(m, 0xFFFFFFFF),
    "table without replacements": lambda m: with_charsmap(m, m.normalizer_spec.precompiled_charsmap[:-1] + b"x"),
    "table that ends nowhere": lambda m: with_units(m, 0x00000561),
    "second table that leads outside": lambda m: setattr(m.denormalizer_spec, "precompiled_charsmap", OUTSIDE),
    "no piece": lambda m: m.ClearField("pieces"),
    "no unknown piece": lambda m: setattr(m.pieces[0], "type", 1),
    "two unknown pieces": lambda m: setattr(m.pieces[5], "type", 2),
    "a score that is no number": lambda m: setattr(m.pieces[270], "score", float("nan")),
    "an infinite score": lambda m: setattr(m.pieces[270], "score", float("inf")),
    "an empty piece": lambda m: setattr(m.pieces[270], "piece", ""),
    "a long piece": lambda m: setattr(m.pieces[270], "piece", "x" * 10**6),
    "a piece twice": lambda m: setattr(m.pieces[270], "piece", m.pieces[271].piece),
    "a byte missing": lambda m: setattr(m.pieces[10], "type", 1),
    "a byte of no number": lambda m: setattr(m.pieces[10], "piece", "<0xZZ>"),
}


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("what", HOSTILE_MODELS)
def test_a_hostile_sentencepiece_model_is_refused(
    trained: dict[str, bytes], tmp_path: Path, what: str, kind: str
) -> None:
    model = proto.ModelProto.FromString(trained[kind])
    HOSTILE_MODELS[what](model)
    assert "spm.model" in try_model(tmp_path, model.SerializeToString())


@given(data=st.data(), kind=st.sampled_from(["bpe", "unigram"]))
@FUZZ
def test_damaged_sentencepiece_models_are_read_or_refused(
    trained: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, kind: str
) -> None:
    raw = data.draw(damaged(trained[kind], data.draw(st.sampled_from([64, 8000, 400_000]))))
    try_model(tmp_path_factory.mktemp("made"), raw)


@given(data=st.data(), kind=st.sampled_from(["bpe", "unigram"]))
@FUZZ
def test_changed_sentencepiece_models_are_read_or_refused(
    trained: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, kind: str
) -> None:
    model = proto.ModelProto.FromString(trained[kind])
    for _ in range(data.draw(st.integers(1, 3))):
        piece = model.pieces[data.draw(st.integers(0, len(model.pieces) - 1))]
        match data.draw(st.sampled_from(["text", "score", "type", "table", "trainer", "spaces"])):
            case "text":
                piece.piece = data.draw(st.text(st.characters(codec="utf-8"), max_size=20))
            case "score":
                piece.score = data.draw(st.floats(width=32))
            case "type":
                piece.type = data.draw(st.integers(1, 6))
            case "table":
                table = bytearray(model.normalizer_spec.precompiled_charsmap)
                # In the units of the array, which lie close together at its beginning.
                table[data.draw(st.integers(0, 20_000) | st.integers(0, len(table) - 1))] ^= data.draw(
                    st.integers(1, 255)
                )
                model.normalizer_spec.precompiled_charsmap = bytes(table)
            case "trainer":
                model.trainer_spec.model_type = data.draw(st.integers(1, 4))
                model.trainer_spec.unk_id = data.draw(st.integers(-1, 10**6))
                model.trainer_spec.byte_fallback = data.draw(st.booleans())
            case "spaces":
                model.normalizer_spec.add_dummy_prefix = data.draw(st.booleans())
                model.normalizer_spec.remove_extra_whitespaces = data.draw(st.booleans())
                model.trainer_spec.treat_whitespace_as_suffix = data.draw(st.booleans())
    try_model(tmp_path_factory.mktemp("made"), model.SerializeToString())
