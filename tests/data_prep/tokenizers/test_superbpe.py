"""Building SuperBPE tokenizers from their files, and the rules of their pre-tokenizers."""

import json
from pathlib import Path
from pydoc_data.topics import topics

import pyarrow.parquet as pq
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from data_prep.tokenizers.superbpe import build_superbpe
from data_prep.tokenizers.superbpe_rules import byte_alphabet, superword_rules, word_rules
from data_prep.tokenizers.superbpe_training import train_superbpe
from tests.hostile import attempt, changed
from yxanul_nemo.errors import UserError

SHARED = Path(__file__).resolve().parents[4] / "shared"
RELEASED = SHARED / "tokenizers"
VALIDATION = SHARED / "data" / "validation"
needs_released = pytest.mark.skipif(
    not (RELEASED.is_dir() and VALIDATION.is_dir()), reason="the released SuperBPE files are not on this machine"
)


@pytest.fixture(scope="module")
def trained() -> tokenizers.Tokenizer:
    return train_superbpe(lambda: iter(topics.values()), 1500, 900, ["<|endoftext|>", "<|padding|>"])


@pytest.fixture
def folder(trained: tokenizers.Tokenizer, tmp_path: Path) -> Path:
    """A small tokenizer in the layout of the released ones."""
    model = json.loads(trained.to_str())["model"]
    merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    first = len(model["vocab"])
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|padding|>": first + 1, "<|endoftext|>": first}))
    return tmp_path


def ids(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def test_files_give_the_tokenizer_they_came_from(trained, folder):
    built = build_superbpe(folder)
    assert built.get_vocab() == trained.get_vocab()
    for text in topics.values():
        assert ids(built, text) == ids(trained, text)


def test_superwords_are_reached(folder):
    built = build_superbpe(folder)
    tokens = built.encode("This is one of the ways in which it is possible to do so.").tokens
    assert any("\u0120" in token.lstrip("\u0120") for token in tokens), tokens


def test_a_tokenizer_json_without_the_other_files_gets_the_same_rules(trained, folder):
    wrong = tokenizers.Tokenizer.from_str(trained.to_str())
    wrong.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    other = folder / "hub"
    other.mkdir()
    wrong.save(str(other / "tokenizer.json"))
    assert json.loads(build_superbpe(other).to_str()) == json.loads(build_superbpe(folder).to_str())


def cut_off_merges(folder: Path) -> str:
    path = folder / "merges.txt"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[: len(lines) // 2]), encoding="utf-8")
    return "merges.txt: 622 tokens of the vocabulary are made by none"


def foreign_merge(folder: Path) -> str:
    path = folder / "merges.txt"
    path.write_text(path.read_text(encoding="utf-8") + "nosuch token\n", encoding="utf-8")
    return "merges.txt, merge in line 1244: 'nosuch token'"


def gap_in_ids(folder: Path) -> str:
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    vocab = {token: number + (number >= 700) for token, number in vocab.items()}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    added = json.loads((folder / "added_tokens.json").read_text())
    (folder / "added_tokens.json").write_text(json.dumps(added))
    return "vocab.json: ids are not 0..1497, the first one missing is 700"


def missing_byte(folder: Path) -> str:
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    newline = next(character for character, byte in byte_alphabet().items() if byte == 0x0A)
    vocab["[UNUSED]"] = vocab.pop(newline)
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    return "vocab.json: 1 bytes of UTF-8 have no token, the first is 0x0A"


def half_a_json(folder: Path) -> str:
    path = folder / "vocab.json"
    path.write_bytes(path.read_bytes()[:1000])
    return "vocab.json: not valid JSON"


def no_merges(folder: Path) -> str:
    (folder / "merges.txt").unlink()
    return "merges.txt: no such file"


def no_added(folder: Path) -> str:
    (folder / "added_tokens.json").unlink()
    return "added_tokens.json: no such file"


def added_elsewhere(folder: Path) -> str:
    (folder / "added_tokens.json").write_text(json.dumps({"<|endoftext|>": 5000}))
    return "added_tokens.json: ids do not follow those of vocab.json"


def not_a_mapping(folder: Path) -> str:
    (folder / "vocab.json").write_text("[1, 2]")
    return "vocab.json: not a JSON object"


@pytest.mark.parametrize(
    "damage",
    [
        cut_off_merges,
        foreign_merge,
        gap_in_ids,
        missing_byte,
        half_a_json,
        no_merges,
        no_added,
        added_elsewhere,
        not_a_mapping,
    ],
)
def test_damaged_files_are_named(folder, damage):
    message = damage(folder)
    with pytest.raises(UserError) as caught:
        build_superbpe(folder)
    assert str(caught.value).startswith(f"{folder}/{message}")


@given(data=st.data(), name=st.sampled_from(["added_tokens.json", "tokenizer_config.json", "tokenizer.json"]))
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_changed_files_are_read_or_refused(trained, folder, data, name):
    tokens = [
        {"id": trained.token_to_id(token), "content": token, "special": True}
        for token in ("<|endoftext|>", "<|padding|>")
    ]
    whole = json.loads(trained.to_str())
    valid = {
        "added_tokens.json": {token["content"]: token["id"] for token in tokens},
        "tokenizer_config.json": {"added_tokens_decoder": {str(token["id"]): token for token in tokens}},
        "tokenizer.json": whole | {"model": {"type": "BPE"}},
    }
    made = data.draw(changed(valid[name]))
    box = folder
    if name == "tokenizer.json":
        box = folder / "hub"
        box.mkdir(exist_ok=True)
        if isinstance(made, dict) and isinstance(made.get("model"), dict):
            made["model"] = whole["model"] | made["model"]
    (box / name).write_text(json.dumps(made))
    attempt("SuperBPE folder", box, lambda: build_superbpe(box))
    (box / name).write_text(json.dumps(valid[name]))


def test_byte_alphabet_is_the_librarys():
    assert sorted(byte_alphabet()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    rule = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in ("".join(map(chr, range(128))), "\u00e9\u4f60\U0001f469\u07ff\uffff"):
        [(written, _)] = rule.pre_tokenize_str(text)
        assert bytes(byte_alphabet()[character] for character in written) == text.encode()


def unbounded_rules() -> pre_tokenizers.PreTokenizer:
    """The rule as published, whose cost is the square of a run of digits."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(Regex(r"(?=(\d{3})+(?!\d))"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet=st.one_of(st.sampled_from("0123456789 .\n\u00b2\u0663\u2460a"), st.characters(codec="utf-8"))))
def test_bounded_rule_splits_as_the_published_one(text):
    assert superword_rules().pre_tokenize_str(text) == unbounded_rules().pre_tokenize_str(text)


@pytest.mark.parametrize("count", [509, 510])
def test_bounded_rule_splits_long_runs_as_the_published_one(count):
    text = "x" + "7" * count + " y"
    assert superword_rules().pre_tokenize_str(text) == unbounded_rules().pre_tokenize_str(text)


@pytest.mark.parametrize("rules", [superword_rules, word_rules])
def test_digits_stand_in_groups_of_three_from_the_right(rules):
    pieces = [piece for piece, _ in rules().pre_tokenize_str("in 1234567 and 12")]
    assert [piece for piece in pieces if piece.isdigit()] == ["1", "234", "567", "12"]


def test_a_very_long_run_of_digits(folder):
    built = build_superbpe(folder)
    text = "0123456789" * 60_000
    encoding = built.encode(text, add_special_tokens=False)
    assert max(map(len, encoding.tokens)) <= 3
    assert built.decode(encoding.ids) == text


@pytest.fixture(scope="module")
def validation_texts() -> list[str]:
    c4 = pq.read_table(VALIDATION / "c4_validation_2k.parquet")["text"].to_pylist()
    gsm8k = pq.read_table(VALIDATION / "gsm8k_validation.parquet")
    code = pq.read_table(VALIDATION / "humaneval_validation.parquet")
    return [
        *c4,
        *(
            f"Question: {q}\nAnswer: {a}"
            for q, a in zip(*(gsm8k[n].to_pylist() for n in ("question", "answer")), strict=True)
        ),
        *(p + s for p, s in zip(*(code[n].to_pylist() for n in ("prompt", "canonical_solution")), strict=True)),
    ]


@pytest.fixture(scope="module", params=["superbpe_t80k", "superbpe_t180k"])
def released(request) -> tuple[str, tokenizers.Tokenizer]:
    built = build_superbpe(RELEASED / request.param)
    built.encode_special_tokens = True
    return request.param, built


@needs_released
def test_released_ids(released):
    name, built = released
    assert built.get_vocab_size() == 200_005
    assert (built.token_to_id("<|endoftext|>"), built.token_to_id("<|padding|>")) == (200_004, 200_001)
    if name == "superbpe_t180k":
        # As llama.cpp and the model's card on the hub give it.
        assert ids(built, "By the way, I am a fan of the Milky Way.") == [
            189205,
            181251,
            244,
            4332,
            180235,
            199785,
            13,
        ]


@needs_released
def test_released_on_validation_text(released, validation_texts):
    name, built = released
    encodings = built.encode_batch_fast(validation_texts, add_special_tokens=False)
    back = built.decode_batch([encoding.ids for encoding in encodings], skip_special_tokens=False)
    assert back == validation_texts
    characters = sum(map(len, validation_texts[:2000]))
    tokens = sum(len(encoding.ids) for encoding in encodings[:2000])
    assert round(characters / tokens, 3) == {"superbpe_t80k": 6.865, "superbpe_t180k": 6.326}[name]


@needs_released
def test_released_on_a_very_long_run_of_digits(released):
    text = "31415926" * 75_000
    encoding = released[1].encode(text, add_special_tokens=False)
    assert max(map(len, encoding.tokens)) <= 3
    assert released[1].decode(encoding.ids) == text


@needs_released
def test_released_round_trip_of_any_text(released):
    built = released[1]

    @settings(max_examples=150, deadline=None)
    @given(st.text())
    def round_trip(text):
        assert built.decode(ids(built, text), skip_special_tokens=False) == text

    round_trip()
