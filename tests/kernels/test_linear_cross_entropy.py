"""The chunked torch path against plain float64 logits; run as a script, one rank of a vocabulary-parallel group."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from yxanul_nemo.kernels import linear_cross_entropy as module
from yxanul_nemo.kernels.linear_cross_entropy import linear_cross_entropy

ROOT = Path(__file__).parents[2]


def make_inputs(tokens, rows, inner, vocab_size, dtype=torch.float32, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    z_TR = torch.randn(tokens, inner, generator=generator).to(device, dtype).requires_grad_()
    e_VR = torch.randn(rows, inner, generator=generator).to(device, dtype).requires_grad_()
    labels_T = torch.randint(0, vocab_size, (tokens,), generator=generator).to(device)
    g_T = torch.randn(tokens, generator=generator).to(device)
    return z_TR, e_VR, labels_T, g_T


def reference(z_TR, e_VR, labels_T, g_T, vocab_size, ignore_index=-100):
    """Loss, dz and dE in float64 from whole logits; the slice gives padded rows no probability."""
    z_TR, e_VR = z_TR.detach().double().requires_grad_(), e_VR.detach().double().requires_grad_()
    logits_TV = z_TR @ e_VR[:vocab_size].T
    loss_T = F.cross_entropy(logits_TV, labels_T.long(), reduction="none", ignore_index=ignore_index)
    return loss_T.detach(), *torch.autograd.grad(loss_T, (z_TR, e_VR), g_T.double())


def relative_error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.fixture
def small_chunks(monkeypatch):
    """Room for 7 tokens' logits of 40 rows, so that several chunks and a shorter last one are used."""
    monkeypatch.setattr(module, "CHUNK_LOGITS_BYTES", 7 * 40 * 8)


def test_double_precision_equals_whole_logits_and_passes_gradcheck(small_chunks):
    z_TR, e_VR, labels_T, g_T = make_inputs(23, 48, 12, 40, torch.float64)
    labels_T[3] = -100
    loss_T = linear_cross_entropy(z_TR, e_VR, labels_T, vocab_size=40)
    dz_TR, de_VR = torch.autograd.grad(loss_T, (z_TR, e_VR), g_T.double())
    expected = reference(z_TR, e_VR, labels_T, g_T, 40)
    for found, wanted in zip((loss_T, dz_TR, de_VR), expected, strict=True):
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    loss_of = lambda z, e: linear_cross_entropy(z, e, labels_T, vocab_size=40)  # noqa: E731
    assert torch.autograd.gradcheck(loss_of, (z_TR, e_VR), fast_mode=True)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 40),
    vocab_size=st.integers(1, 70),
    padding=st.integers(0, 9),
    inner=st.integers(1, 33),
    chunk_tokens=st.integers(1, 50),
    ignore_index=st.sampled_from([-100, 0]),
    int32=st.booleans(),
)
def test_any_shape_equals_whole_logits(tokens, vocab_size, padding, inner, chunk_tokens, ignore_index, int32):
    z_TR, e_VR, labels_T, g_T = make_inputs(tokens, vocab_size + padding, inner, vocab_size)
    if tokens > 2:
        labels_T[1] = ignore_index
    if int32:
        labels_T = labels_T.int()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_LOGITS_BYTES", chunk_tokens * vocab_size * 4)
        loss_T = linear_cross_entropy(z_TR, e_VR, labels_T, vocab_size=vocab_size, ignore_index=ignore_index)
        dz_TR, de_VR = torch.autograd.grad(loss_T, (z_TR, e_VR), g_T)
    expected = reference(z_TR, e_VR, labels_T, g_T, vocab_size, ignore_index)
    assert loss_T.dtype == torch.float32
    for found, wanted in zip((loss_T, dz_TR, de_VR), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spread", [0.05, 1.0, 4.0], ids=["near_uniform", "random", "wide"])
def test_bfloat16_stays_within_the_stated_errors(small_chunks, spread):
    z_TR, e_VR, labels_T, g_T = make_inputs(50, 120, 64, 117, torch.bfloat16)
    e_VR = (e_VR.detach() * spread).requires_grad_()
    loss_T = linear_cross_entropy(z_TR, e_VR, labels_T, vocab_size=117)
    dz_TR, de_VR = torch.autograd.grad(loss_T, (z_TR, e_VR), g_T)
    expected = reference(z_TR, e_VR, labels_T, g_T, 117)
    assert (loss_T.dtype, dz_TR.dtype, de_VR.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    assert relative_error(loss_T, expected[0]) < 1e-5
    assert relative_error(dz_TR, expected[1]) < 1e-2
    assert relative_error(de_VR, expected[2]) < 1e-2


def test_padded_rows_get_no_probability_and_a_gradient_of_exactly_zero():
    z_TR, e_VR, labels_T, g_T = make_inputs(30, 64, 16, 50)
    loss_T = linear_cross_entropy(z_TR, e_VR, labels_T, vocab_size=50)
    (de_VR,) = torch.autograd.grad(loss_T, e_VR, g_T)
    assert torch.count_nonzero(de_VR[50:]) == 0
    with torch.no_grad():
        e_VR[50:] = 1e4
    assert torch.equal(linear_cross_entropy(z_TR, e_VR, labels_T, vocab_size=50), loss_T)


def test_ignored_tokens_have_no_loss_and_no_gradient_whatever_they_hold():
    z_TR, e_VR, labels_T, g_T = make_inputs(30, 50, 16, 50)
    labels_T[::3], g_T[::3] = -100, float("nan")
    loss_T = linear_cross_entropy(z_TR, e_VR, labels_T, vocab_size=50)
    dz_TR, de_VR = torch.autograd.grad(loss_T, (z_TR, e_VR), g_T)
    assert torch.count_nonzero(loss_T[::3]) == 0 and torch.count_nonzero(dz_TR[::3]) == 0
    kept = labels_T != -100
    expected = reference(z_TR[kept], e_VR, labels_T[kept], g_T[kept], 50)
    torch.testing.assert_close(de_VR.double(), expected[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("label", [50, 63, 64, -1])
def test_a_label_outside_the_vocabulary_makes_its_loss_nan_and_leaves_the_others(label):
    z_TR, e_VR, labels_T, g_T = make_inputs(30, 64, 16, 50)
    clean_T = linear_cross_entropy(z_TR, e_VR, labels_T, vocab_size=50).detach()
    labels_T[4] = label
    loss_T = linear_cross_entropy(z_TR, e_VR, labels_T, vocab_size=50)
    assert loss_T[4].isnan()
    rest = torch.arange(30) != 4
    assert torch.equal(loss_T.detach()[rest], clean_T[rest])
    dz_TR, de_VR = torch.autograd.grad(loss_T, (z_TR, e_VR), g_T)
    assert dz_TR.isfinite().all() and de_VR.isfinite().all() and torch.count_nonzero(dz_TR[4]) == 0


def test_loss_is_never_negative_where_the_label_is_certain():
    z_TR, e_VR, labels_T, _ = make_inputs(200, 60, 32, 60)
    labels_T = (z_TR @ e_VR.T).argmax(1)
    loss_T = linear_cross_entropy(z_TR * 30, e_VR, labels_T, vocab_size=60)
    assert (loss_T >= 0).all() and loss_T.isfinite().all()


def test_frozen_inputs_and_no_grad():
    z_TR, e_VR, labels_T, g_T = make_inputs(20, 30, 8, 30)
    both = torch.autograd.grad(linear_cross_entropy(z_TR, e_VR, labels_T, vocab_size=30), (z_TR, e_VR), g_T)
    only_z = linear_cross_entropy(z_TR, e_VR.detach(), labels_T, vocab_size=30)
    only_e = linear_cross_entropy(z_TR.detach(), e_VR, labels_T, vocab_size=30)
    assert torch.equal(torch.autograd.grad(only_z, z_TR, g_T)[0], both[0])
    assert torch.equal(torch.autograd.grad(only_e, e_VR, g_T)[0], both[1])
    with torch.no_grad():
        loss_T = linear_cross_entropy(z_TR, e_VR, labels_T, vocab_size=30)
    assert not loss_T.requires_grad and torch.equal(loss_T, only_z.detach())


class LargestTensor(TorchDispatchMode):
    """Remembers the elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return result


def test_no_tensor_is_larger_than_one_chunk_of_logits(monkeypatch):
    tokens, rows, inner = 400, 500, 4
    monkeypatch.setattr(module, "CHUNK_LOGITS_BYTES", 10 * rows * 4)
    z_TR, e_VR, labels_T, g_T = make_inputs(tokens, rows, inner, rows)
    with LargestTensor() as largest:
        loss_T = linear_cross_entropy(z_TR, e_VR, labels_T, vocab_size=rows)
        loss_T.backward(g_T)
    assert largest.elements == 10 * rows


def test_results_repeat_to_the_last_bit():
    z_TR, e_VR, labels_T, g_T = make_inputs(64, 40, 16, 5)
    runs = []
    for _ in range(2):
        loss_T = linear_cross_entropy(z_TR, e_VR, labels_T, vocab_size=40, deterministic=True)
        runs.append((loss_T, *torch.autograd.grad(loss_T, (z_TR, e_VR), g_T)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_autocast_does_not_lower_the_precision():
    z_TR, e_VR, labels_T, g_T = make_inputs(30, 50, 16, 50)
    plain_T = linear_cross_entropy(z_TR, e_VR, labels_T, vocab_size=50)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast_T = linear_cross_entropy(z_TR, e_VR, labels_T, vocab_size=50)
        cast_grads = torch.autograd.grad(cast_T, (z_TR, e_VR), g_T)
    assert torch.equal(plain_T, cast_T)
    plain_grads = torch.autograd.grad(plain_T, (z_TR, e_VR), g_T)
    assert all(torch.equal(a, b) for a, b in zip(plain_grads, cast_grads, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z_TR": torch.zeros(3, 5)}, "must be"),
        ({"labels_T": torch.zeros(4, dtype=torch.int64)}, "labels_T"),
        ({"labels_T": torch.zeros(3)}, "labels_T"),
        ({"e_VR": torch.zeros(6, 4, dtype=torch.bfloat16)}, "one dtype"),
        ({"vocab_size": 7}, "vocab_size 7"),
        ({"vocab_size": 0}, "vocab_size 0"),
        ({"impl": "cuda"}, "impl"),
        ({"impl": "triton"}, "not on a GPU"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, message):
    inputs = {"z_TR": torch.zeros(3, 4), "e_VR": torch.zeros(6, 4), "labels_T": torch.zeros(3, dtype=torch.int64)}
    inputs = {**inputs, "vocab_size": 6, **change}
    z_TR, e_VR, labels_T = (inputs.pop(name) for name in ("z_TR", "e_VR", "labels_T"))
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(z_TR, e_VR, labels_T, **inputs)


def run_vocabulary_parallel(folder: Path, ranks: int, vocab_size: int, device: str, impl: str) -> list[dict]:
    """What each rank of a group returned: one process per rank, all over the same inputs."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(folder), str(ranks), str(vocab_size), device, impl]
    workers = [subprocess.Popen([*command, str(rank)], env=environment, cwd=ROOT) for rank in range(ranks)]
    assert [worker.wait(timeout=120) for worker in workers] == [0] * ranks
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(ranks)]


def check_vocabulary_parallel(results, vocab_size, dtype, loss_error, gradient_error):
    """Every rank has the whole loss and dz; the ranks' dE, one after the other, are the whole table's."""
    rows = results[0]["de_VR"].shape[0] * len(results)
    z_TR, e_VR, labels_T, g_T = make_inputs(37, rows, 16, vocab_size, dtype)
    labels_T[5] = -100
    expected = reference(z_TR, e_VR, labels_T, g_T, vocab_size)
    de_VR = torch.cat([result["de_VR"] for result in results])
    assert relative_error(de_VR, expected[2]) < gradient_error
    assert torch.count_nonzero(de_VR[vocab_size:]) == 0
    for result in results:
        assert relative_error(result["loss_T"], expected[0]) < loss_error
        assert relative_error(result["dz_TR"], expected[1]) < gradient_error
        assert torch.equal(result["loss_T"], results[0]["loss_T"])
        assert torch.equal(result["dz_TR"], results[0]["dz_TR"])


def test_vocabulary_parallel_equals_one_process(tmp_path):
    """The first of three ranks holds 32 valid rows, the second 8 and padding, the third padding alone."""
    results = run_vocabulary_parallel(tmp_path, 3, 40, "cpu", "torch")
    check_vocabulary_parallel(results, 40, torch.float32, 1e-6, 1e-5)


def vocabulary_parallel_rank(folder, ranks, vocab_size, device, impl, rank):
    """One rank: 32 rows of the table, results saved for the test."""
    folder, ranks, vocab_size, rank = Path(folder), int(ranks), int(vocab_size), int(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    dtype = torch.bfloat16 if impl == "triton" else torch.float32
    z_TR, whole_VR, labels_T, g_T = make_inputs(37, ranks * 32, 16, vocab_size, dtype, device=device)
    e_VR = whole_VR.detach()[rank * 32 : (rank + 1) * 32].clone().requires_grad_()
    labels_T[5] = -100
    loss_T = linear_cross_entropy(z_TR, e_VR, labels_T, vocab_size=vocab_size, tp_group=dist.group.WORLD, impl=impl)
    dz_TR, de_VR = torch.autograd.grad(loss_T, (z_TR, e_VR), g_T)
    results = {"loss_T": loss_T.detach().cpu(), "dz_TR": dz_TR.cpu(), "de_VR": de_VR.cpu()}
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    vocabulary_parallel_rank(*sys.argv[1:])
