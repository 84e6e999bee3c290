"""Two-stage training: exact merges, the rules of stage 2, the command line."""

import collections
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_prep.tokenizers.superbpe_merges import SEPARATOR, MergeRules, learn_merges
from data_prep.tokenizers.superbpe_rules import byte_alphabet
from data_prep.tokenizers.superbpe_training import encode_stream, train_bpe, train_superbpe
from data_prep.tokenizers.tokenizer import Tokenizer
from data_prep.train_superbpe import main
from yxanul_nemo.errors import UserError

DOCUMENTS = list(topics.values())
TRAINING, HELDOUT = DOCUMENTS[::2] + DOCUMENTS[1::4], DOCUMENTS[3::4]
EOS = "<|endoftext|>"
SIZE, TRANSITION = 4000, 2000
ALPHABET_BYTES = byte_alphabet()


def training() -> "collections.abc.Iterator[str]":
    return iter(TRAINING)


@pytest.fixture(scope="module")
def superbpe():
    return train_superbpe(training, SIZE, TRANSITION, [EOS])


def model_of(tokenizer) -> dict:
    return json.loads(tokenizer.to_str())["model"]


def bytes_of(token: str) -> bytes:
    return bytes(ALPHABET_BYTES[character] for character in token)


def may_merge(content: bytes, left: bytes, right: bytes, rules: MergeRules) -> bool:
    """The rules as one reads them, on the text of the token that would result."""
    return (
        len(content.split()) <= rules.max_words
        and not left.isdigit()
        and not right.isdigit()
        and (rules.cross_newline or not re.search(rb"[\r\n]\s*\S", content))
        and (rules.cross_colon or not re.search(rb":\s+\S", content))
    )


def places(stream: list[int], pair: tuple[int, int]) -> list[int]:
    """Where a left-to-right reading merges `pair`."""
    found: list[int] = []
    for place in range(len(stream) - 1):
        if (stream[place], stream[place + 1]) == pair and (not found or place > found[-1] + 1):
            found.append(place)
    return found


def apply(stream: list[int], pair: tuple[int, int], made: int) -> list[int]:
    starts = set(places(stream, pair))
    return [made if place in starts else token for place, token in enumerate(stream) if place - 1 not in starts]


def slow_merges(stream: list[int], contents: list[bytes], count: int, rules: MergeRules) -> list[tuple[int, int]]:
    """Greedy BPE that counts everything anew for each merge."""
    contents, merges = list(contents), []
    while len(merges) < count:
        pairs = {pair for pair in itertools.pairwise(stream) if SEPARATOR not in pair}
        counted = {
            pair: len(places(stream, pair))
            for pair in pairs
            if (content := contents[pair[0]] + contents[pair[1]]) not in contents
            and may_merge(content, contents[pair[0]], contents[pair[1]], rules)
        }
        best = min(counted, key=lambda pair: (-counted[pair], pair), default=None)
        if best is None or counted[best] < 2:
            break
        stream = apply(stream, best, len(contents))
        contents.append(contents[best[0]] + contents[best[1]])
        merges.append(best)
    return merges


ALPHABET = [b"a", b"b", b" a", b" ", b"\n", b"\n  ", b":", b"7", b",", b" b", b"aa"]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(SEPARATOR, len(ALPHABET) - 1), max_size=80),
    st.integers(1, 20),
    st.builds(MergeRules, st.integers(1, 4), st.booleans(), st.booleans()),
)
@example([0] * 9 + [SEPARATOR] + [0] * 7, 5, MergeRules())
@example([0, 1] * 20, 6, MergeRules())
def test_merges_are_those_of_plain_greedy_bpe_under_the_rules(stream, count, rules):
    ids_N = np.array(stream, dtype=np.int32)
    assert learn_merges(ids_N, ALPHABET, count, rules) == slow_merges(stream, ALPHABET, count, rules)


def test_nothing_to_merge():
    assert learn_merges(np.array([], dtype=np.int32), ALPHABET, 3, MergeRules()) == []


def test_exact_size_and_stage_1_as_a_prefix(superbpe):
    words = model_of(train_bpe(training, TRANSITION, []))
    final = model_of(superbpe)
    assert superbpe.get_vocab_size() == SIZE
    assert superbpe.token_to_id(EOS) == SIZE - 1
    assert sorted(superbpe.get_vocab().values()) == list(range(SIZE))
    assert final["merges"][: len(words["merges"])] == words["merges"]
    assert {token: number for token, number in final["vocab"].items() if number < TRANSITION} == words["vocab"]
    assert len(final["merges"]) - len(words["merges"]) == SIZE - 1 - TRANSITION


def test_the_encoder_ends_where_training_ended(superbpe):
    words = train_bpe(training, TRANSITION, [])
    words.pre_tokenizer = superbpe.pre_tokenizer
    stream = encode_stream(words, TRAINING)
    model = model_of(superbpe)
    for left, right in model["merges"][-(SIZE - 1 - TRANSITION) :]:
        pair, made = (model["vocab"][left], model["vocab"][right]), model["vocab"][left + right]
        at = np.flatnonzero((stream[:-1] == pair[0]) & (stream[1:] == pair[1]))
        if pair[0] == pair[1]:
            at = np.array(places(stream.tolist(), pair), dtype=np.int64)
        stream[at] = made
        stream = np.delete(stream, at + 1)
    assert np.array_equal(stream, encode_stream(superbpe, TRAINING))


def test_superwords_keep_the_rules(superbpe):
    vocab = model_of(superbpe)["vocab"]
    later = [bytes_of(token) for token, number in vocab.items() if number >= TRANSITION]
    assert max(len(content.split()) for content in later) == 4
    assert not [content for content in later if re.search(rb"[\r\n]\s*\S", content)]
    assert not [content for content in later if re.search(rb":\s+\S", content)]
    assert not [content for content in later if re.search(rb"\d", content)]
    assert any(len(content.split()) > 1 for content in later)


def test_tokens_of_heldout_text_keep_the_rules(superbpe):
    text = "\n\n".join(HELDOUT) + "\nIt was 12345 of the\nend: of the 678 in the"
    encoding = superbpe.encode(text, add_special_tokens=False)
    for token in map(bytes_of, encoding.tokens):
        assert not re.search(rb"[\r\n]\s*\S", token)
        assert token.isdigit() or not re.search(rb"\d", token)
        assert not token.isdigit() or len(token) <= 3


@pytest.mark.parametrize(
    ("option", "pattern"),
    [
        ({"cross_newline": True}, rb"[\r\n]\s*\S"),
        ({"cross_colon": True}, rb":\s+\S"),
        ({"max_words": 6}, rb"(\S+\s+){4}\S+"),
    ],
)
def test_options_lift_the_rules(option, pattern):
    tokenizer = train_superbpe(training, SIZE, TRANSITION, [EOS], **option)
    assert any(re.search(pattern, bytes_of(token)) for token in model_of(tokenizer)["vocab"])


def test_one_word_at_most_gives_no_superword():
    tokenizer = train_superbpe(training, 2400, TRANSITION, [EOS], max_words=1)
    assert all(len(bytes_of(token).split()) <= 1 for token in model_of(tokenizer)["vocab"])


def test_digits_outside_ascii_never_join_text():
    texts = [text.replace("e ", "e\u00b2 ") for text in TRAINING]
    tokenizer = train_superbpe(lambda: iter(texts), 1000, 700, [EOS])
    assert tokenizer.token_to_id("\u00c2\u00b2") is not None
    assert not [
        token for token in map(bytes_of, model_of(tokenizer)["vocab"]) if re.search(rb"[a-z ]\xc2|\xb2[ a-z]", token)
    ]


def test_fewer_tokens_than_plain_bpe_of_the_same_size(superbpe):
    plain = train_bpe(training, SIZE, [EOS])
    assert plain.get_vocab_size() == SIZE
    counts = [
        sum(len(encoding.ids) for encoding in tokenizer.encode_batch(HELDOUT, add_special_tokens=False))
        for tokenizer in (superbpe, plain)
    ]
    assert counts[0] < 0.93 * counts[1]


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_comes_back(superbpe, text):
    tokenizer = Tokenizer.wrap(superbpe, EOS, None, "test")
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_heldout_text_comes_back(superbpe):
    for text in HELDOUT:
        assert superbpe.decode(superbpe.encode(text, add_special_tokens=False).ids) == text


@pytest.mark.parametrize("threads", ["1", "2"])
def test_the_result_does_not_depend_on_threads_or_hash_seeds(superbpe, threads):
    script = (
        "import sys; from pydoc_data.topics import topics; from data_prep.tokenizers.superbpe_training import train_superbpe\n"
        "documents = list(topics.values()); texts = documents[::2] + documents[1::4]\n"
        f"sys.stdout.write(train_superbpe(lambda: iter(texts), {SIZE}, {TRANSITION}, ['{EOS}']).to_str())"
    )
    environment = os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
    root = Path(__file__).resolve().parents[3]
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=root, capture_output=True, text=True, check=True
    )
    assert json.loads(run.stdout) == json.loads(superbpe.to_str())


def test_training_stops_at_max_bytes():
    taken = []

    def endless():
        while True:
            for text in DOCUMENTS:
                taken.append(len(text.encode()))
                yield text

    train_bpe(endless, 400, [EOS], max_bytes=100_000)
    assert 100_000 <= sum(taken) < 100_000 + max(taken)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (
            lambda: train_superbpe(lambda: iter(["a b c d " * 9]), 3000, 2000, [EOS]),
            "2000 tokens inside words were asked",
        ),
        (
            lambda: train_superbpe(lambda: iter(["ab cd ef " * 9]), 300, 262, [EOS]),
            "300 is more than this text yields: ",
        ),
        (lambda: train_superbpe(training, 1000, 999, [EOS]), "999 leaves nothing to learn across words"),
        (lambda: train_bpe(training, 200, [EOS]), "leaves 199 tokens for words"),
        (lambda: train_bpe(lambda: iter([]), 300, [EOS]), "no text at all"),
    ],
)
def test_what_cannot_be_trained_is_refused(train, message):
    with pytest.raises(UserError, match=re.escape(message)):
        train()


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    path = tmp_path / "text.parquet"
    pq.write_table(pa.table({"text": [*TRAINING, None, ""], "id": range(len(TRAINING) + 2)}), path)
    return path


def test_command_line(superbpe, parquet, tmp_path):
    output = tmp_path / "made"
    arguments = ["--input", str(parquet), "--vocab-size", str(SIZE), "--transition", str(TRANSITION)]
    assert main([*arguments, "--output", str(output)]) == 0
    made = Tokenizer.load(output)
    assert made.fingerprint == Tokenizer.wrap(superbpe, EOS, None, "test").fingerprint
    assert json.loads((output / "fingerprint.json").read_text())["settings"]["max_words"] == 4


def test_command_line_keeps_what_is_there(parquet, tmp_path, capsys):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "precious").write_text("x")
    arguments = ["--input", str(parquet), "--vocab-size", "300", "--plain", "--output", str(tmp_path / "made")]
    assert main(arguments) == 2
    assert f"{tmp_path}/made: is not empty" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "made").iterdir()] == ["precious"]


@pytest.mark.parametrize("options", [[], ["--plain", "--transition", "300"], ["--plain", "--max-words", "0"]])
def test_command_line_refuses_options_that_do_not_fit(parquet, tmp_path, options):
    with pytest.raises(SystemExit) as caught:
        main(["--input", str(parquet), "--vocab-size", "400", "--output", str(tmp_path / "made"), *options])
    assert caught.value.code == 2
