"""The faster encoder gives the ids of the plain one, for any text and any tokenizer that it accepts."""

import copy
import json
import random
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pyarrow.parquet as pq
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from data_prep.tokenizers import superword_encoder, superword_tables, tokenizer_libraries
from data_prep.tokenizers.superbpe import build_superbpe
from data_prep.tokenizers.superbpe_training import train_bpe, train_superbpe
from data_prep.tokenizers.superword_encoder import SuperwordEncoder
from data_prep.tokenizers.tokenizer import Tokenizer

DOCUMENTS = list(topics.values())
EOS = "<|endoftext|>"
SHARED = Path(__file__).resolve().parents[4] / "shared"
RELEASED = SHARED / "tokenizers"
needs_released = pytest.mark.skipif(not RELEASED.is_dir(), reason="the released SuperBPE files are not on this machine")

AWKWARD = "aB e'.,\"-_(\n\t\r 0123\u00b2\u00bd\u0663\u2460\u00e9\u2019\u201c\u00a0\u2003\u4f60\u0301\U0001f469\u200d\x00\x7f<|"
any_text = st.one_of(
    st.text(),
    st.text(alphabet=AWKWARD, max_size=60),
    st.lists(
        st.sampled_from(
            [
                "of the",
                " don't",
                "1\u00bd",
                " 12345",
                "m\u00b2 of",
                "caf\u00e9, ",
                "it\u2019s ",
                ".\n",
                "  ",
                EOS,
                "|||IP_ADDRESS|||",
                "1,000",
            ]
        ),
        max_size=12,
    ).map("".join),
)


def plain_ids(tokenizer: tokenizers.Tokenizer, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def made(tokenizer: tokenizers.Tokenizer) -> SuperwordEncoder:
    tokenizer.encode_special_tokens = True
    encoder = SuperwordEncoder.for_tokenizer(tokenizer)
    assert encoder is not None
    return encoder


def taken(encoder: SuperwordEncoder, texts: list[str]) -> list[str]:
    """Texts that are not left to the tokenizer."""
    return [text for text, ids in zip(texts, encoder.encode_batch(texts), strict=True) if ids is not None]


@pytest.fixture(scope="module")
def trained() -> tokenizers.Tokenizer:
    return train_superbpe(lambda: iter(DOCUMENTS), 4000, 2500, [EOS])


def assert_same(tokenizer: tokenizers.Tokenizer, encoder: SuperwordEncoder, texts: list[str]) -> None:
    for text, fast, plain in zip(texts, encoder.encode_batch(texts), plain_ids(tokenizer, texts), strict=True):
        if fast is not None:
            assert fast.dtype == np.int32
            assert fast.tolist() == plain, text


def test_real_text(trained):
    encoder = made(trained)
    assert_same(trained, encoder, DOCUMENTS)
    assert_same(trained, encoder, DOCUMENTS)
    assert taken(encoder, DOCUMENTS) == DOCUMENTS


def test_any_text(trained):
    encoder = made(trained)

    @settings(max_examples=300, deadline=None)
    @given(st.lists(any_text, max_size=4))
    @example(["1\u00b2 x", "", "x1\u00bd2"])
    def same(texts):
        assert_same(trained, encoder, texts)

    same()


@pytest.mark.parametrize("seed", range(6))
def test_tokenizers_whose_merges_cross_everything(seed, monkeypatch):
    """Text without any order gives merges that cross each border early. ASCII digits stay out of it: their merges come late."""
    monkeypatch.setattr(superword_tables, "LEAST_SHARE", 0)
    generator = random.Random(seed)
    texts = ["".join(generator.choices(re.sub("[0-9]", "", AWKWARD), k=3000)) for _ in range(5)]
    tokenizer = train_superbpe(lambda: iter(texts), 900, 500, [EOS], 3, cross_newline=True, cross_colon=True)
    encoder = made(tokenizer)
    assert_same(tokenizer, encoder, texts)
    assert_same(tokenizer, encoder, ["".join(generator.choices(AWKWARD, k=40)) for _ in range(300)])
    few = ["".join(generator.choices("aB e'.,_(\n 013\u00e9\u2019", k=12)) for _ in range(300)]
    assert_same(tokenizer, encoder, few)
    assert taken(encoder, few) == few


@needs_released
@pytest.mark.parametrize("name", ["superbpe_t80k", "superbpe_t180k"])
def test_released(name):
    tokenizer = build_superbpe(RELEASED / name)
    encoder = made(tokenizer)
    for file in sorted((SHARED / "data" / "validation").glob("*.parquet")):
        table = pq.read_table(file)
        for column in table.column_names:
            if column not in ("url", "timestamp"):
                texts = table[column].to_pylist()
                assert_same(tokenizer, encoder, texts)
                assert len(taken(encoder, texts)) > 0.99 * len(texts)

    @settings(max_examples=100, deadline=None)
    @given(st.lists(any_text, max_size=4))
    @example(["1\u00bd", "x1\u00bd y", "|||IP_ADDRESS||| of the"])
    def same(texts):
        assert_same(tokenizer, encoder, texts)

    same()


@pytest.mark.parametrize(
    "unit", ["3f8a", "\u00e9 a.", "a.", "7", "1\u00b2", " ", "\u4f60\u597d", "x'", "\u00e91a", "\n\n", "word "]
)
def test_long_runs(trained, unit):
    text = unit * 20_000
    assert_same(trained, made(trained), [text, text + "\u00e9"])


def test_numbers_are_cut_as_the_pre_tokenizer_cuts_them(trained):
    """Groups of three from the end, and apart from all else, also beside characters of several bytes."""
    texts = [
        "1234567",
        "x12345y",
        "\u00a31234",
        "1930\u2019s",
        "9\u201311",
        "\u20ac12345\u20136,789.1011",
        "caf\u00e9 2019\u201d.",
    ]
    texts += [
        "1\u00bd",
        "12345\u00b2",
        "\u00b212345",
        "m\u00b2 of",
        "\u0661\u0662\u0663\u0664",
        "12\u0663\u06641",
        "\u4e09\u2160\u2161\u21624",
    ]
    encoder = made(trained)
    assert_same(trained, encoder, texts)
    assert taken(encoder, texts) == texts


def test_what_is_left_to_the_tokenizer(trained):
    encoder = made(trained)
    long = "of the " * (superword_encoder.SLICE_BYTES // 7 + 1)
    texts = ["1\u0378", "\u4f60\u597d" * 200, "7" * (superword_encoder.LONGEST_PIECE + 1), long]
    assert taken(encoder, ["", *texts, "and the rest"]) == ["", "and the rest"]


def test_slices_and_one_text_at_a_time_are_the_same(trained, monkeypatch):
    monkeypatch.setattr(superword_encoder, "SLICE_BYTES", 30_000)
    encoder = made(trained)
    assert_same(trained, encoder, DOCUMENTS)
    for text in DOCUMENTS[:20]:
        assert_same(trained, encoder, [text])


def test_a_copy_as_another_process_gets_it(trained):
    encoder = made(trained)
    encoder.encode_batch(DOCUMENTS[:10])
    assert_same(trained, copy.deepcopy(encoder), DOCUMENTS)


def test_threads_share_it(trained):
    encoder = made(trained)
    parts = [DOCUMENTS[start::4] for start in range(4)]
    with ThreadPoolExecutor(4) as threads:
        for texts, encoded in zip(parts, threads.map(encoder.encode_batch, parts), strict=True):
            assert [ids.tolist() for ids in encoded] == plain_ids(trained, texts)


def test_memory_starts_anew_when_full(trained, monkeypatch):
    monkeypatch.setattr(superword_encoder, "MEMORY_PIECES", 10)
    encoder = made(trained)
    for text in DOCUMENTS[:10]:
        assert_same(trained, encoder, [text])


def changed(tokenizer: tokenizers.Tokenizer, change) -> tokenizers.Tokenizer:
    content = json.loads(tokenizer.to_str())
    change(content)
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def second_merge_into_one_token(content: dict) -> None:
    """At the end, so that a token of words can be made from tokens across words."""
    model = content["model"]
    made = {"".join(merge): merge for merge in model["merges"][:1000]}
    token = next(token for token, merge in made.items() if len(token) == 3 and len(merge[0]) == 2 and token[1:] in made)
    model["merges"].append([token[0], token[1:]])


def digit_joined_to_a_letter(content: dict) -> None:
    model = content["model"]
    model["vocab"]["a7"] = content["added_tokens"][0]["id"]
    content["added_tokens"][0]["id"] += 1
    model["merges"].append(["a", "7"])


def token_without_a_merge(content: dict) -> None:
    content["model"]["merges"].pop()


def words_are_split(content: dict) -> None:
    content["pre_tokenizer"]["pretokenizers"][-1]["use_regex"] = True


def whole_pieces_first(content: dict) -> None:
    content["model"]["ignore_merges"] = True


@pytest.mark.parametrize(
    "change",
    [
        second_merge_into_one_token,
        digit_joined_to_a_letter,
        token_without_a_merge,
        words_are_split,
        whole_pieces_first,
    ],
)
def test_tokenizers_outside_the_conditions_are_not_taken(trained, change):
    assert SuperwordEncoder.for_tokenizer(changed(trained, lambda content: None)) is not None
    assert SuperwordEncoder.for_tokenizer(changed(trained, change)) is None


def test_other_kinds_are_not_taken(trained):
    assert SuperwordEncoder.for_tokenizer(train_bpe(lambda: iter(DOCUMENTS), 500, [EOS])) is None
    lowered = changed(trained, lambda content: None)
    lowered.normalizer = normalizers.Lowercase()
    assert SuperwordEncoder.for_tokenizer(lowered) is None


def test_a_tokenizer_changes_over_unnoticed(trained, monkeypatch):
    tokenizer = Tokenizer.wrap(trained, EOS, None, "test")
    before = [ids.tolist() for ids in tokenizer.encode_batch(DOCUMENTS)]
    monkeypatch.setattr(tokenizer_libraries, "BULK_CHARS", 100_000)
    other = Tokenizer.wrap(changed(trained, lambda content: None), EOS, None, "test")
    after = [other.encode(text).tolist() for text in DOCUMENTS]
    assert other._library._bulk_encoder is not None
    assert after == before
