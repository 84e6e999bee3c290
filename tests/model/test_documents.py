"""Attention inside documents against the same documents alone; what is packed is never seen from outside its document."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.model.plain_gpt import PlainGPT
from tests.ranks import run_ranks
from yxanul_nemo.config.load import compose, parse
from yxanul_nemo.config.model import ModelConfig
from yxanul_nemo.config.training import ParallelConfig, PrecisionConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.model.build import build_model, reference_precision
from yxanul_nemo.model.documents import (
    Documents,
    count_documents,
    document_starts,
    hidden_tokens,
    packed_sequences,
    room_for,
)
from yxanul_nemo.model.gpt import YxanulGPT

VOCAB, EOS = 101, 7
LENGTHS = (8, 16, 32, 64, 128, 256, 512, 768, 1536, 2048)
SHAPE = ModelConfig(
    name="t", num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, kv_groups=2, head_dim=16,
    embedding_rank=24, max_position_embeddings=2048, init_std=0.25,
)  # fmt: skip
# Ends of documents at the beginning and end of a window, several in a row, none at all, nothing else.
PLACES = ((0, 5, 6, 7, 15), (15,), (), (3, 9), (0,), tuple(range(16)))


@pytest.fixture(scope="module")
def model() -> YxanulGPT:
    return build_model(SHAPE, VOCAB, *reference_precision(), seed=3)


@pytest.fixture(scope="module")
def plain(model: YxanulGPT) -> PlainGPT:
    return PlainGPT(SHAPE, dict(model.named_parameters()))


def random_ids(windows: int, seq_len: int, seed: int = 0) -> torch.Tensor:
    """Without EOS."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(EOS + 1, VOCAB, (windows, seq_len), generator=generator)


def windows_with_eos(seq_len: int = 16) -> torch.Tensor:
    ids_BT = random_ids(len(PLACES), seq_len)
    for row, places in zip(ids_BT, PLACES, strict=True):
        row[list(places)] = EOS
    return ids_BT


def with_random_eos(windows: int, seq_len: int, mean_tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seq_len)
    ends = torch.rand(windows, seq_len, generator=generator) < 1 / mean_tokens
    return random_ids(windows, seq_len).masked_fill(ends, EOS)


def spans(row: list[int]) -> list[tuple[int, int]]:
    """First token and end of each document of a window, by a plain loop."""
    begins = [place for place, token in enumerate(row) if place == 0 or token == EOS]
    return list(zip(begins, [*begins[1:], len(row)], strict=True))


@pytest.mark.parametrize(
    "ids_BT",
    [windows_with_eos(), *(with_random_eos(max(1, 64 // n), n, max(3, n // 5)) for n in LENGTHS)],
    ids=lambda ids_BT: f"{ids_BT.size(1)} tokens",
)
def test_packed_documents_are_those_that_are_read_alone(
    model: YxanulGPT, plain: PlainGPT, ids_BT: torch.Tensor
) -> None:
    """Logits and gradients; alone means plain torch, whole attention, positions from 0."""
    labels_BT = ids_BT.roll(-1, dims=1)
    logits_BTV = model(ids_BT, documents=Documents(EOS))
    model.zero_grad()
    loss_BT = model(ids_BT, labels_BT, Documents(EOS))
    loss_BT.mean().backward()
    plain.zero_grad()
    for row, ids_T in enumerate(ids_BT):
        for first, end in spans(ids_T.tolist()):
            alone_TV = plain(ids_T[None, first:end], VOCAB)[0]
            assert (logits_BTV[row, first:end] - alone_TV).norm() < 2e-5 * alone_TV.norm()
            loss = F.cross_entropy(alone_TV, labels_BT[row, first:end], reduction="none")
            torch.testing.assert_close(loss_BT[row, first:end], loss, rtol=1e-4, atol=1e-4)
            (loss.sum() / ids_BT.numel()).backward()
    for name, weight in model.named_parameters():
        other = plain.weight(name).grad
        assert (weight.grad - other).norm() / other.norm() < 2e-4, name


def test_other_documents_keep_their_bits_when_one_changes(model: YxanulGPT) -> None:
    ids_BT = windows_with_eos()
    before = model(ids_BT, documents=Documents(EOS))
    for row, ids_T in enumerate(ids_BT):
        for first, end in spans(ids_T.tolist()):
            place = end - 1
            if ids_T[place] == EOS:
                continue
            changed_BT = ids_BT.clone()
            changed_BT[row, place] = VOCAB - 1 - changed_BT[row, place] % 5
            same_BT = (model(changed_BT, documents=Documents(EOS)) == before).all(dim=-1)
            own_BT = torch.zeros_like(same_BT)
            own_BT[row, first:end] = True
            assert same_BT[~own_BT].all()
            assert not same_BT[row, place]


def test_without_eos_the_mask_is_that_of_whole_windows(model: YxanulGPT) -> None:
    ids_BT = random_ids(4, 32)
    torch.testing.assert_close(model(ids_BT, documents=Documents(EOS)), model(ids_BT), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(windows_with_eos(), documents=Documents(EOS)), model(windows_with_eos()))


def test_a_text_behind_its_eos_needs_no_mask(model: YxanulGPT) -> None:
    """As validation, evaluation and generation feed it: EOS and the text, then padding that nothing scored sees."""
    ids_BT = random_ids(3, 32)
    ids_BT[:, 0] = ids_BT[:, 25:] = EOS
    masked, whole = model(ids_BT, documents=Documents(EOS)), model(ids_BT)
    torch.testing.assert_close(masked[:, :25], whole[:, :25], rtol=1e-5, atol=1e-5)


def test_starts_lists_and_counts_are_those_of_a_plain_loop() -> None:
    for ids_BT in (windows_with_eos(), with_random_eos(16, 256, 20), random_ids(3, 5)):
        of_rows = [spans(row) for row in ids_BT.tolist()]
        starts = [[first for first, end in row for _ in range(first, end)] for row in of_rows]
        starts_BT = document_starts(ids_BT, EOS)
        assert starts_BT.tolist() == starts and starts_BT.dtype == torch.int32
        n_time = ids_BT.size(1)
        for row, hidden_TT in zip(starts, hidden_tokens(starts_BT)[:, 0].tolist(), strict=True):
            assert hidden_TT == [[not row[q] <= k <= q for k in range(n_time)] for q in range(n_time)]
        ends = [0] + [row * n_time + end for row, found in enumerate(of_rows) for _, end in found]
        assert count_documents(torch.stack((random_ids(*ids_BT.shape), ids_BT)), EOS) == len(ends) - 1
        for room in (len(ends) - 1, room_for(len(ends) - 1), 500):
            packed = packed_sequences(ids_BT, Documents(EOS, room))
            assert packed.cu_seqlens_q.tolist() == ends + [ids_BT.numel()] * (room + 1 - len(ends))
            assert packed.cu_seqlens_q.dtype == torch.int32 and packed.max_seqlen_q == n_time
        with pytest.raises(RuntimeError):
            packed_sequences(ids_BT, Documents(EOS, len(ends) - 2))


def test_rooms_are_powers_of_two() -> None:
    assert [room_for(n) for n in (1, 32, 33, 64, 65, 512, 513, 5000)] == [32, 32, 64, 64, 128, 512, 1024, 8192]


def masked_losses(tensor_parallel: int) -> list[float]:
    """Of training steps on tensor-parallel ranks."""
    from yxanul_nemo.config.training import OptimConfig
    from yxanul_nemo.training.cpu_backend import CpuBackend

    parallel = ParallelConfig(device="cpu", layer_spec="torch", tensor_parallel=tensor_parallel)
    model = build_model(SHAPE, VOCAB, PrecisionConfig(name="fp32"), parallel, seed=5)
    backend = CpuBackend(model, OptimConfig(lr=1e-2), documents=Documents(EOS))
    ids_BT = windows_with_eos()
    ids_ABT, labels_ABT = ids_BT[None], ids_BT.roll(-1, dims=1)[None]
    return [float(backend.train_step(ids_ABT, labels_ABT, 1e-2, 1.0).loss) for _ in range(3)]


def test_tensor_parallel_ranks_mask_alike() -> None:
    expected = run_ranks(masked_losses, 1, 1)[0]
    assert expected[-1] < expected[0]
    for losses in run_ranks(masked_losses, 2, 2):
        assert losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (("parallel.context_parallel=2",), "parallel.context_parallel=2"),
        (("model.head_dim=48",), "model.head_dim, not 48"),
        (("precision.fp8_attention=true",), "precision.fp8_attention=true"),
    ],
    ids=["context parallelism", "head_dim", "FP8 attention"],
)
def test_what_does_not_go_with_a_mask_is_refused_by_name(overrides: tuple[str, ...], named: str) -> None:
    asked = ("recipe=yxanul_197m_h100", f"data.sources.text.path={Path('corpus')}", *overrides)
    parse(compose([*asked]))
    with pytest.raises(UserError, match=rf"data\.document_mask=true.*{named}"):
        parse(compose([*asked, "data.document_mask=true"]))
