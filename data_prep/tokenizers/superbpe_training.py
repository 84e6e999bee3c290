"""Train a SuperBPE or a plain BPE tokenizer on text.

Stage 1 is byte-level BPE inside words, by the `tokenizers` library, up to `transition` tokens. Then the text is encoded with
stage 1's merges but without the word rule, as the finished tokenizer will apply them, and stage 2 (`superbpe_merges`) merges the
resulting tokens across words. The finished tokenizer has stage 1's merges as a prefix and gives training text exactly the
tokens that training ended with.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack

import numpy as np
import tokenizers
from tokenizers import AddedToken, models, trainers

from data_prep.tokenizers.superbpe_merges import SEPARATOR, MergeRules, learn_merges
from data_prep.tokenizers.superbpe_rules import assemble, byte_alphabet, superword_rules, token_contents, word_rules
from data_prep.tokenizers.training_display import TrainingDisplay
from yxanul_nemo.errors import UserError

ENCODE_BATCH_BYTES = 2_000_000
"""Text given to the encoder at once: enough for all cores, little memory."""

Texts = Callable[[], Iterator[str]]


def train_bpe(
    texts: Texts, vocab_size: int, special_tokens: Sequence[str], max_bytes: int = 100_000_000
) -> tokenizers.Tokenizer:
    """Plain byte-level BPE with GPT-2's words and digit groups of three.

    Args:
        texts: gives the training text from its start.
        vocab_size: size of the vocabulary, special tokens included.
        special_tokens: they get the last ids, in this order.
        max_bytes: text used, in bytes of UTF-8, from the start; documents are used whole.

    Raises:
        UserError: the text does not yield so many tokens.
    """
    with TrainingDisplay() as display:
        words = _train_words(texts, vocab_size - len(special_tokens), max_bytes, display)
    vocab, merges = _parts(words)
    return assemble(vocab, merges, word_rules(), _special(special_tokens))


def train_superbpe(
    texts: Texts,
    vocab_size: int,
    transition: int,
    special_tokens: Sequence[str],
    max_words: int = 4,
    cross_newline: bool = False,
    cross_colon: bool = False,
    max_bytes: int = 100_000_000,
) -> tokenizers.Tokenizer:
    """Two-stage SuperBPE. The result depends on the text and these arguments alone, not on threads or hash seeds.

    Args:
        texts: gives the training text from its start; called twice.
        vocab_size: size of the vocabulary, special tokens included.
        transition: size at which merges begin to cross words, below `vocab_size`.
        special_tokens: they get the last ids, in this order.
        max_words: longest token, in words.
        cross_newline: allow text after a newline within a token.
        cross_colon: allow ': text' within a token.
        max_bytes: text used, in bytes of UTF-8, from the start; documents are used whole.

    Raises:
        UserError: the text does not yield so many tokens.
    """
    wanted = vocab_size - len(special_tokens) - transition
    if wanted < 1:
        raise UserError(
            "tokenizer.transition",
            f"{transition} leaves nothing to learn across words",
            f"below vocab_size={vocab_size} less {len(special_tokens)} special tokens",
        )
    with TrainingDisplay() as display:
        vocab, merges = _parts(_train_words(texts, transition, max_bytes, display))
        raw = assemble(vocab, merges, superword_rules(), [])
        names = sorted(vocab, key=vocab.__getitem__)
        with display.step("stage 2: encoding", max_bytes) as advance:
            ids_N = encode_stream(raw, _first_bytes(texts, max_bytes, advance))
        with display.step("stage 2: merging across words", wanted) as advance:
            rules = MergeRules(max_words, cross_newline, cross_colon)
            learned = learn_merges(ids_N, token_contents(names), wanted, rules, progress=advance)
    if len(learned) < wanted:
        raise UserError(
            "tokenizer.vocab_size",
            f"{vocab_size} is more than this text yields: {vocab_size - wanted + len(learned)} tokens",
            "a smaller vocabulary, or more text",
        )
    for left, right in learned:
        merges.append((names[left], names[right]))
        vocab[names[left] + names[right]] = len(names)
        names.append(names[left] + names[right])
    return assemble(vocab, merges, superword_rules(), _special(special_tokens))


def encode_stream(tokenizer: tokenizers.Tokenizer, texts: Iterable[str]) -> np.ndarray:
    """All texts as one int32 array of shape [tokens], with SEPARATOR between texts and in place of digits outside ASCII.

    ASCII digits stay: the pre-tokenizer keeps them in tokens of their own, which the rules of stage 2 never merge. Of other
    digits the bytes alone do not tell, so they are cut out here, where they are still characters.
    """
    pieces: list[np.ndarray] = []
    separator = np.array([SEPARATOR], dtype=np.int32)
    batch: list[str] = []
    batch_chars = 0

    def encode() -> None:
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            pieces.append(np.array(encoding.ids, dtype=np.int32))
            pieces.append(separator)
        batch.clear()

    for text in texts:
        batch.extend(_without_other_digits(text))
        batch_chars += len(text)
        if batch_chars >= ENCODE_BATCH_BYTES:
            encode()
            batch_chars = 0
    encode()
    return np.concatenate(pieces) if pieces else separator


def _without_other_digits(text: str) -> list[str]:
    """The parts of a text between its digits (Unicode's number categories) that are not ASCII."""
    if text.isascii():
        return [text]
    digits = [char for char in set(text) if not char.isascii() and unicodedata.category(char).startswith("N")]
    return list(filter(None, re.split(f"[{''.join(digits)}]", text))) if digits else [text]


def _train_words(texts: Texts, size: int, max_bytes: int, display: TrainingDisplay) -> tokenizers.Tokenizer:
    """Byte-level BPE inside words with exactly `size` tokens."""
    alphabet = sorted(byte_alphabet())
    if size < len(alphabet):
        raise UserError(
            "tokenizer.vocab_size", f"leaves {size} tokens for words", f"at least the {len(alphabet)} bytes"
        )
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    words = tokenizers.Tokenizer(models.BPE())
    words.pre_tokenizer = word_rules()

    def read_then_merge() -> Iterator[str]:
        # The library counts words while it reads; when nothing is left to read it merges, before its call returns.
        with display.step("stage 1: counting words", max_bytes) as advance:
            yield from _first_bytes(texts, max_bytes, advance)
        steps.enter_context(display.step("stage 1: merging inside words"))

    with ExitStack() as steps:
        words.train_from_iterator(read_then_merge(), trainer)
    if words.get_vocab_size() != size:
        raise UserError(
            "tokenizer.vocab_size",
            f"{size} tokens inside words were asked of text that yields {words.get_vocab_size()}",
            "a smaller vocab_size (or transition), or more text",
        )
    return words


def _parts(tokenizer: tokenizers.Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a BPE tokenizer."""
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [(left, right) for left, right in model["merges"]]


def _special(tokens: Sequence[str]) -> list[AddedToken]:
    return [AddedToken(token, special=True, normalized=False) for token in tokens]


def _first_bytes(texts: Texts, max_bytes: int, advance: Callable[[int], None]) -> Iterator[str]:
    """Documents from the start until they come to `max_bytes` of UTF-8; the last one is whole."""
    used = 0
    for text in texts():
        used += len(text.encode())
        advance(min(used, max_bytes))
        yield text
        if used >= max_bytes:
            break
    if not used:
        raise UserError("tokenizer", "is to be trained on no text at all", "documents that are not empty")
