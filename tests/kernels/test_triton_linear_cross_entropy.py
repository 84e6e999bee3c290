"""The Triton kernels against float64 logits: in BF16 on a GPU, and in FP32 in Triton's interpreter, which cannot multiply BF16."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.kernels.interpreter import run_interpreted
from tests.training.gpu_steps import VOCAB, backend, config, structured
from yxanul_nemo.kernels.linear_cross_entropy import linear_cross_entropy
from yxanul_nemo.kernels.vocab_shard import VocabShard

pytest.importorskip("triton", reason="Triton is installed on Linux hosts only")
from benchmarks.linear_cross_entropy import head_inputs
from yxanul_nemo.kernels import triton_linear_cross_entropy as module

# The inputs, the reference and the vocabulary-parallel ranks are those of the torch path's tests.
common = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("test_linear_cross_entropy.py"))))

DEVICE, DTYPE = "cuda", torch.bfloat16
LIMITS = {torch.bfloat16: (1e-5, 1e-2, 1e-2), torch.float32: (1e-6, 1e-5, 1e-5)}
"""Of the loss and both gradients, norms of the errors relative to their norms."""
SHAPES = [
    # tokens, rows, vocabulary, inner dimension
    (1, 128, 128, 128),
    (8, 2000, 1999, 128),
    (129, 1000, 937, 128),
    (300, 64, 33, 16),
    (300, 5000, 4990, 48),
    (1000, 5000, 5000, 64),
    (257, 3000, 2881, 176),
    (257, 3000, 2881, 256),
    (4096, 50_304, 50_257, 128),
]
WEIGHTS = ("positive", "negative", "mask", "mean", "zero")

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def gpu(test):
    for mark in needs_gpu:
        test = mark(test)
    return test


def run(z_TR, e_VR, labels_T, g_T, vocab_size, **options):
    if z_TR.is_cuda:
        loss_T = linear_cross_entropy(z_TR, e_VR, labels_T, vocab_size=vocab_size, impl="triton", **options)
    else:
        shard = VocabShard.of(e_VR.shape[0], vocab_size, None)
        loss_T = module.triton_linear_cross_entropy(z_TR, e_VR, labels_T, shard, ignore_index=-100)
    return loss_T, *torch.autograd.grad(loss_T, (z_TR, e_VR), g_T)


def make_inputs(tokens, rows, inner, vocab_size, spread=1.0):
    z_TR, e_VR, labels_T, g_T = common.make_inputs(tokens, rows, inner, vocab_size, DTYPE, device=DEVICE)
    return z_TR, (e_VR.detach() * spread).requires_grad_(), labels_T, g_T


def check(found, expected):
    assert [x.dtype for x in found] == [torch.float32, DTYPE, DTYPE]
    for x, wanted, limit in zip(found, expected, LIMITS[DTYPE], strict=True):
        assert common.relative_error(x, wanted) < limit


def interpreted(trained_inputs: str) -> None:
    """What the tests on a GPU check, and the inputs of a trained head from a file."""
    global DEVICE, DTYPE
    DEVICE, DTYPE = "cpu", torch.float32
    module.Gpu.of = classmethod(lambda cls, device: cls((9, 0), 4))
    for shape in (*SHAPES[:4], (257, 500, 450, 176)):
        test_equals_whole_logits(*shape, 4.0 if shape[0] == 8 else 1.0)
    for weight in ("negative", "zero"):
        test_any_weight_per_token(weight)
    test_logits_far_above_those_of_the_first_rows_are_summed_again()
    test_many_tokens_with_one_label_and_ignored_and_wrong_ones()
    trained = torch.load(trained_inputs, weights_only=True)
    inputs = [trained[name].requires_grad_(trained[name].is_floating_point()) for name in ("z_TR", "e_VR", "labels_T")]
    check(run(*inputs, trained["g_T"], VOCAB), common.reference(*inputs, trained["g_T"], VOCAB))
    print("all")


def test_ranges_cover_the_vocabulary_and_none_is_empty():
    tiles = module.Tiles(128, 64, 8, 3, 2)
    for tokens in (1, 8, 127, 2048, 4096, 32768, 40000, 10**6):
        for valid_rows in (1, 63, 64, 65, 5000, 200_019):
            ranges, per_range = module._ranges(tokens, valid_rows, tiles, 132)
            assert per_range % tiles.rows == 0
            assert (ranges - 1) * per_range < valid_rows <= ranges * per_range


def test_ranges_fill_the_gpu_for_few_tokens_and_are_not_used_for_many():
    tiles = module.Tiles(128, 64, 8, 3, 2)
    assert module._ranges(32768, 200_064, tiles, 132)[0] == 1
    for tokens in (2048, 4096, 16384, 40000):
        ranges, _ = module._ranges(tokens, 200_064, tiles, 132)
        programs = -(-tokens // 128) * ranges
        rounds = -(-programs // 264)
        assert programs > 0.9 * 264 * rounds


TRAINED_STEPS, TRAINED_LOSS = 60, 5.0


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_the_head_of_a_trained_model_and_all_else_in_the_interpreter(device, tmp_path):
    """On a CPU in FP32, the rest with it because a process is needed; on a GPU in BF16."""
    precision = {"cpu": "fp32", "cuda": "bf16"}[device]
    settings = config(f"precision={precision}", f"parallel.device={device}", "model.embedding_init_std=0.05")
    made = backend(settings, micro_batch_size=8, seq_len=64)
    for step in range(TRAINED_STEPS):
        ids_ABT, labels_ABT = (x.to(device) for x in structured(step, 64, 16))
        made.train_step(ids_ABT, labels_ABT, 1e-3, 1.0)
    z_TR, e_VR, labels_T = head_inputs(made.model, ids_ABT[0], labels_ABT[0])
    with torch.no_grad():
        loss_T = made.model(ids_ABT[0], labels_ABT[0], None).flatten()
    g_T = torch.full_like(loss_T, 1 / loss_T.numel())
    expected = common.reference(z_TR, e_VR, labels_T, g_T, VOCAB)
    assert expected[0].mean() < TRAINED_LOSS, "far from the uniform 8.3"
    assert common.relative_error(loss_T, expected[0]) < 1e-5, "these are the head's inputs"
    if device == "cuda":
        check(run(z_TR, e_VR, labels_T, g_T, VOCAB), expected)
    else:
        inputs = {"z_TR": z_TR.detach(), "e_VR": e_VR.detach(), "labels_T": labels_T, "g_T": g_T}
        torch.save(inputs, tmp_path / "inputs.pt")
        assert run_interpreted(__file__, str(tmp_path / "inputs.pt")) == "all\n"
    made.close()


@gpu
@pytest.mark.parametrize("spread", [0.05, 1.0, 4.0], ids=["near_uniform", "random", "wide"])
@pytest.mark.parametrize(("tokens", "rows", "vocab_size", "inner"), SHAPES)
def test_equals_whole_logits(tokens, rows, vocab_size, inner, spread):
    inputs = make_inputs(tokens, rows, inner, vocab_size, spread)
    if tokens > 2:
        inputs[2][1] = -100
    found = run(*inputs, vocab_size)
    check(found, common.reference(*inputs, vocab_size))
    assert torch.count_nonzero(found[2][vocab_size:]) == 0


@gpu
@pytest.mark.parametrize("weight", WEIGHTS)
def test_any_weight_per_token(weight):
    z_TR, e_VR, labels_T, g_T = make_inputs(500, 1000, 128, 1000)
    g_T = {
        "positive": g_T.abs(),
        "negative": -g_T.abs(),
        "mask": (g_T > 0).float(),
        "mean": torch.full_like(g_T, 1 / 500),
        "zero": torch.zeros_like(g_T),
    }[weight]
    found = run(z_TR, e_VR, labels_T, g_T, 1000)
    if weight == "zero":
        assert torch.count_nonzero(found[1]) == 0 and torch.count_nonzero(found[2]) == 0
    else:
        check(found, common.reference(z_TR, e_VR, labels_T, g_T, 1000))


@gpu
def test_logits_far_above_those_of_the_first_rows_are_summed_again():
    """Row 900 is e^180 times as likely as the first rows, past what the first reference can hold."""
    z_TR, e_VR, labels_T, g_T = make_inputs(200, 1000, 64, 1000, 0.01)
    with torch.no_grad():
        z_TR[:100] = 1.0
        e_VR[900] = 180 / 64
    found = run(z_TR, e_VR, labels_T, g_T, 1000)
    check(found, common.reference(z_TR, e_VR, labels_T, g_T, 1000))


@gpu
def test_many_tokens_with_one_label_and_ignored_and_wrong_ones():
    z_TR, e_VR, labels_T, g_T = make_inputs(2000, 700, 128, 650)
    labels_T[:1500], labels_T[1500:1600] = 3, -100
    expected = common.reference(z_TR, e_VR, labels_T, g_T, 650)
    check(run(z_TR, e_VR, labels_T, g_T, 650), expected)
    labels_T[1500:1600:2] = 650
    found = run(z_TR, e_VR, labels_T, g_T, 650)
    assert found[0][1500:1600:2].isnan().all() and found[0][1501:1600:2].eq(0).all()
    assert common.relative_error(found[1], expected[1]) < 1e-2
    assert common.relative_error(found[2], expected[2]) < 1e-2


@gpu
def test_views_that_are_not_contiguous_or_aligned():
    z_TR, e_VR, labels_T, g_T = make_inputs(300, 500, 64, 500)
    shifted = torch.empty(300 * 64 + 1, device="cuda", dtype=torch.bfloat16)[1:].view(300, 64)
    shifted.copy_(z_TR.detach())
    strided = e_VR.detach().t().contiguous().t()
    found = run(shifted.requires_grad_(), strided.requires_grad_(), labels_T, g_T, 500)
    check(found, common.reference(z_TR, e_VR, labels_T, g_T, 500))


@gpu
def test_results_repeat_to_the_last_bit():
    inputs = make_inputs(3000, 2000, 128, 1999)
    inputs[2][:1000] = 7
    first, second = run(*inputs, 1999, deterministic=True), run(*inputs, 1999, deterministic=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@gpu
def test_a_cuda_graph_replays_with_new_inputs_and_nothing_waits_for_the_gpu():
    inputs = make_inputs(700, 2000, 128, 1999)
    other = [x.detach().flip(0) for x in inputs]
    # Copies, because autograd's nodes remember the stream of a leaf's first use, which must be the captured one.
    eager = run(*(x.detach().clone().requires_grad_(x.requires_grad) for x in inputs), 1999)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(*inputs, 1999)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = run(*inputs, 1999)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True))
    with torch.no_grad():
        for static, new in zip(inputs, other, strict=True):
            static.copy_(new)
    graph.replay()
    check(captured, common.reference(*inputs, 1999))


@gpu
def test_memory_stays_far_below_the_logits():
    tokens, rows = 8192, 100_000
    inputs = make_inputs(tokens, rows, 64, rows)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(*inputs, rows)
    assert torch.cuda.max_memory_allocated() - before < 0.1 * tokens * rows * 2


@gpu
def test_only_the_loss_when_no_gradient_is_asked_for():
    z_TR, e_VR, labels_T, g_T = make_inputs(500, 1000, 128, 1000)
    loss_T, _, de_VR = run(z_TR, e_VR, labels_T, g_T, 1000)
    with torch.no_grad():
        bare_T = linear_cross_entropy(z_TR, e_VR, labels_T, vocab_size=1000, impl="triton")
    torch.testing.assert_close(bare_T, loss_T, rtol=1e-6, atol=1e-6)
    only_e = linear_cross_entropy(z_TR.detach(), e_VR, labels_T, vocab_size=1000, impl="triton")
    torch.testing.assert_close(torch.autograd.grad(only_e, e_VR, g_T)[0], de_VR, rtol=1e-2, atol=1e-3)


@gpu
def test_auto_takes_triton_for_bfloat16_and_torch_for_the_rest():
    z_TR, e_VR, labels_T, g_T = make_inputs(100, 1000, 128, 1000)
    auto_T = linear_cross_entropy(z_TR, e_VR, labels_T, vocab_size=1000)
    assert torch.equal(auto_T, run(z_TR, e_VR, labels_T, g_T, 1000)[0])
    for inputs in ((z_TR.float(), e_VR.float()), (z_TR[:, :24], e_VR[:, :24]), (z_TR.half(), e_VR.half())):
        assert module.why_unsupported(*inputs) is not None
        auto_T = linear_cross_entropy(*inputs, labels_T, vocab_size=1000)
        assert torch.equal(auto_T, linear_cross_entropy(*inputs, labels_T, vocab_size=1000, impl="torch"))


@gpu
def test_torch_path_on_the_gpu_stays_within_the_stated_errors():
    inputs = make_inputs(500, 3000, 128, 2990)
    loss_T = linear_cross_entropy(*inputs[:3], vocab_size=2990, impl="torch")
    found = loss_T, *torch.autograd.grad(loss_T, inputs[:2], inputs[3])
    check(found, common.reference(*inputs, 2990))


@gpu
def test_vocabulary_parallel_equals_one_process(tmp_path):
    results = common.run_vocabulary_parallel(tmp_path, 3, 40, "cuda", "triton")
    common.check_vocabulary_parallel(results, 40, torch.bfloat16, 1e-5, 1e-2)
