"""Every token once, whatever the batch, padding and window; equal to a plain loop."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from yxanul_nemo.validation import scoring
from yxanul_nemo.validation.record import advice, surprise_ratios
from yxanul_nemo.validation.scoring import Document, batches_of, domain_score, score_documents, windows_of

VOCAB, EOS = 50, 49


class Bigrams(torch.nn.Module):
    """A model whose loss depends on the token and the one before, in FP64: window sizes must not matter to it."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3

    def forward(self, ids_BT: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.logits[ids_BT].flatten(0, 1), labels_BT.flatten(), reduction="none").view(
            ids_BT.shape
        )


def documents(lengths: list[int]) -> list[Document]:
    rng = np.random.default_rng(1)
    return [Document(rng.integers(0, EOS, size=n), int(rng.integers(n, 5 * n + 1))) for n in lengths]


def plain_nats(model: Bigrams, document: Document) -> float:
    """One token after another, from EOS on."""
    total, before = 0.0, EOS
    for token in document.ids:
        total -= model.logits[before].log_softmax(-1)[token].item()
        before = int(token)
    return total


@given(
    n_tokens=st.lists(st.integers(0, 500), min_size=1, max_size=5),
    eval_len=st.integers(1, 64),
    stride=st.integers(1, 64),
)
def test_windows_score_each_token_once_with_context_within_bounds(
    n_tokens: list[int], eval_len: int, stride: int
) -> None:
    stride = min(stride, eval_len)
    windows = windows_of(np.array(n_tokens), eval_len, stride)
    scored: list[list[int]] = [[] for _ in n_tokens]
    for document, start, length, count in zip(
        windows.document_W, windows.start_W, windows.length_W, windows.scored_W, strict=True
    ):
        assert 1 <= length <= eval_len
        stop = start + length
        scored[document] += range(stop - count, stop)
        assert start == 0 or stop - count - start >= eval_len - stride, (
            "a token lost the context that the stride promises"
        )
    assert scored == [list(range(n)) for n in n_tokens]


@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=60),
    batch_tokens=st.integers(1, 2000),
    few_shapes=st.booleans(),
)
def test_batches_hold_each_window_once_and_fit(lengths: list[int], batch_tokens: int, few_shapes: bool) -> None:
    length_W, seen = np.array(lengths), []
    shapes = set()
    for chosen, rows, columns in batches_of(length_W, batch_tokens, few_shapes):
        assert 1 <= len(chosen) <= rows and length_W[chosen].max() <= columns
        assert rows * columns % 16 == 0
        assert rows * columns <= batch_tokens or rows == 1 or (rows, columns) == (2, 8)
        seen += chosen.tolist()
        shapes.add((rows, columns))
    assert sorted(seen) == list(range(len(lengths)))
    if few_shapes:
        assert len(shapes) == len({columns for _, columns in shapes}) <= 6


@pytest.mark.parametrize("batch_tokens", [1, 7, 64, 10**6])
@pytest.mark.parametrize(("eval_len", "stride"), [(4, 2), (16, 16), (100, 50), (1000, 500)])
def test_sums_equal_a_plain_loop_whatever_batch_and_window(batch_tokens: int, eval_len: int, stride: int) -> None:
    model, texts = Bigrams(), documents([1, 2, 3, 17, 64, 65, 200])
    nats = score_documents(model, texts, eos_id=EOS, eval_len=eval_len, stride=stride, batch_tokens=batch_tokens)
    assert nats == pytest.approx([plain_nats(model, text) for text in texts], rel=1e-12)


@pytest.mark.parametrize("batch_tokens", [1, 64, 10**6])
def test_the_shapes_of_a_gpu_give_the_same_sums(batch_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batches of a GPU, with rows and columns that hold nothing, on a CPU."""
    model, texts = Bigrams(), documents([1, 2, 3, 17, 64, 65, 200])
    plan = scoring.batches_of
    monkeypatch.setattr(scoring, "batches_of", lambda length_W, tokens, few_shapes: plan(length_W, tokens, True))
    nats = score_documents(model, texts, eos_id=EOS, eval_len=100, stride=50, batch_tokens=batch_tokens)
    assert nats == pytest.approx([plain_nats(model, text) for text in texts], rel=1e-12)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_sums() -> None:
    model, texts = Bigrams(), documents([1, 2, 3, 17, 64, 65, 200])
    expected = [plain_nats(model, text) for text in texts]
    model.logits = model.logits.cuda()
    for batch_tokens in (1, 64, 10**4):
        nats = score_documents(
            model, texts, eos_id=EOS, eval_len=100, stride=50, batch_tokens=batch_tokens, device="cuda"
        )
        assert nats == pytest.approx(expected, rel=1e-12)


def test_domain_figures_follow_from_the_sums() -> None:
    texts = documents([5, 50, 20])
    nats = np.array([10.0, 120.0, 33.0])
    score = domain_score(texts, nats)
    assert score.tokens == 75 and score.documents == 3
    assert score.loss_nats_per_token == pytest.approx(163 / 75)
    assert score.perplexity == pytest.approx(math.exp(163 / 75))
    assert score.bits_per_byte == pytest.approx(163 / math.log(2) / sum(text.text_bytes for text in texts))


def test_standard_error_is_that_of_resampled_documents() -> None:
    rng = np.random.default_rng(0)
    texts = documents(list(rng.integers(20, 200, size=300)))
    nats = np.array([len(t.ids) * 2.0 + rng.normal(0, 30) for t in texts])
    draws = []
    for _ in range(2000):
        chosen = rng.integers(0, 300, size=300)
        draws.append(nats[chosen].sum() / math.log(2) / sum(texts[i].text_bytes for i in chosen))
    assert domain_score(texts, nats).bits_per_byte_standard_error == pytest.approx(np.std(draws), rel=0.1)


def test_surprise_ratios_and_their_advice() -> None:
    ratios = surprise_ratios({"english": 10.0, "math": 30.0, "code": 20.0})
    assert ratios == {"english": 0.5, "math": 1.5, "code": 1.0}
    assert advice(1.51).startswith("struggles") and advice(1.4) == "more of its data"
    assert advice(0.79).startswith("excels") and advice(0.82) == "less of its data" and advice(1.0) == ""
