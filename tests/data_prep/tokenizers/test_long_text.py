"""Encoding span by span gives the ids of encoding the whole, with work in proportion to the text."""

import json
import random
from pydoc_data.topics import topics

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from data_prep.tokenizers import long_text, tokenizer_libraries
from data_prep.tokenizers.long_text import LongTextEncoder
from data_prep.tokenizers.superbpe_training import train_bpe, train_superbpe
from data_prep.tokenizers.tokenizer import Tokenizer

DOCUMENTS = list(topics.values())
EOS = "<|endoftext|>"
MATCHED = "|||ADDRESS|||"


@pytest.fixture(scope="module")
def trained() -> tokenizers.Tokenizer:
    made = train_superbpe(lambda: iter(DOCUMENTS), 4000, 2500, [EOS])
    made.add_tokens([MATCHED])
    made.encode_special_tokens = True
    return made


@pytest.fixture
def short_spans(monkeypatch):
    monkeypatch.setattr(long_text, "SPAN_CHARS", 120)
    monkeypatch.setattr(long_text, "OVERLAP_BYTES", 30)
    monkeypatch.setattr(tokenizer_libraries, "SPAN_CHARS", 120)


class Counted:
    """Encodes with the plain tokenizer and keeps the length of each text given to it."""

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self.tokenizer = tokenizer
        self.lengths: list[int] = []

    def __call__(self, text: str) -> np.ndarray:
        self.lengths.append(len(text))
        return np.array(self.tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids, dtype=np.int32)


def assert_same(tokenizer: tokenizers.Tokenizer, text: str) -> Counted:
    encoder = LongTextEncoder.for_tokenizer(tokenizer)
    assert encoder is not None
    counted = Counted(tokenizer)
    assert encoder.encode(text, counted).tolist() == Counted(tokenizer)(text).tolist()
    return counted


UNITS = [
    "word ",
    "a",
    "\u4f60\u597d",
    "\n",
    " ",
    "3f8a",
    "caf\u00e9. ",
    "of the ",
    "'s",
    "=-",
    "\u0663x",
    "1,000 ",
    f"x{MATCHED} ",
]


@pytest.mark.parametrize("unit", UNITS)
def test_work_is_in_proportion_to_the_text(trained, unit, monkeypatch):
    monkeypatch.setattr(long_text, "SPAN_CHARS", 2000)
    monkeypatch.setattr(long_text, "OVERLAP_BYTES", 200)
    text = unit * (40_000 // len(unit))
    counted = assert_same(trained, text)
    # The overlap is at least so many bytes and ends with a token; each span is cut where no rule looks across.
    assert max(counted.lengths) < 2000 + 200 + 100
    assert sum(counted.lengths) < 1.2 * len(text)


def test_one_endless_number_costs_little_more_than_itself(trained, short_spans):
    """There is no place to cut it, so that it is taken whole, after tries that are short beside it."""
    text = "".join(random.Random(0).choices("0123456789", k=30_000))
    counted = assert_same(trained, text)
    assert sum(counted.lengths) < 2.5 * len(text)
    between = assert_same(trained, DOCUMENTS[0][:1000] + text + DOCUMENTS[1][:1000])
    assert sum(between.lengths) < 3.5 * len(text)


def test_real_text(trained, short_spans):
    for text in DOCUMENTS:
        assert_same(trained, text)


def test_any_text(trained, short_spans):
    @settings(max_examples=200, deadline=None)
    @given(
        st.lists(st.one_of(st.sampled_from(UNITS), st.text(max_size=20), st.integers(1, 10**12).map(str)), max_size=200)
    )
    def same(parts):
        assert_same(trained, "".join(parts))

    same()


@pytest.mark.parametrize("span_chars", [40, 12, 4])
def test_overlaps_that_are_too_short(span_chars, monkeypatch):
    """Over two letters nearly every place lies in many tokens: the end of a span has other tokens far back."""
    monkeypatch.setattr(long_text, "SPAN_CHARS", span_chars)
    monkeypatch.setattr(long_text, "OVERLAP_BYTES", 1)
    for seed in range(6):
        generator = random.Random(seed)
        texts = ["".join(generator.choices("ab ", k=3000)) for _ in range(3)]
        tokenizer = train_superbpe(lambda texts=texts: iter(texts), 520, 400, [EOS])
        tokenizer.encode_special_tokens = True
        for text in texts + ["".join(generator.choices("ab", k=1000)) for _ in range(10)]:
            assert_same(tokenizer, text)


def test_a_tokenizer_takes_long_texts_among_others(trained, short_spans):
    tokenizer = Tokenizer.wrap(trained, EOS, None, "test")
    plain = Counted(trained)
    for texts in ([DOCUMENTS[0]], ["short", DOCUMENTS[1], "", EOS + DOCUMENTS[2], "also short"]):
        assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == [plain(text).tolist() for text in texts]


def test_rules_that_look_across_a_cut_are_not_taken(trained):
    def changed(change) -> tokenizers.Tokenizer:
        content = json.loads(trained.to_str())
        change(content)
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
        tokenizer.encode_special_tokens = True
        return tokenizer

    assert LongTextEncoder.for_tokenizer(changed(lambda content: None)) is not None
    words = changed(lambda content: content["pre_tokenizer"]["pretokenizers"][-1].update(use_regex=True))
    assert LongTextEncoder.for_tokenizer(words) is None
    matches_words = changed(lambda content: None)
    matches_words.add_tokens([AddedToken("of", single_word=True)])
    assert LongTextEncoder.for_tokenizer(matches_words) is None
    finds_specials = changed(lambda content: None)
    finds_specials.encode_special_tokens = False
    assert LongTextEncoder.for_tokenizer(finds_specials) is None
    assert LongTextEncoder.for_tokenizer(train_bpe(lambda: iter(DOCUMENTS), 500, [EOS])) is None
