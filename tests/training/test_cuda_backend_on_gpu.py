"""Whole optimizer steps on a GPU: graph against eager, GPU against CPU, FP8 against BF16, and state through a checkpoint."""

from pathlib import Path

import pytest
import torch

from tests.training.gpu_steps import VOCAB, backend, config, losses, structured
from yxanul_nemo.checkpoint.shards import ShardReader, save_shards
from yxanul_nemo.checkpoint.snapshot import HostSnapshot
from yxanul_nemo.model.fp8_state import forget_fp8_state, scaling_state_kept, scaling_tensors, without_absent_scales
from yxanul_nemo.model.sharding import sharded_tensors

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "precision",
    ["bf16", "fp8_hybrid", "fp8_hybrid parallel.fused_layers=false", "bf16 optim=muon", "fp8_hybrid optim=muon"],
)
def test_graph_and_eager_train_alike(precision: str) -> None:
    settings = f"precision={precision}".split()
    eager = losses(backend(config(*settings, "parallel.cuda_graph=false")), range(50))
    made = backend(config(*settings))
    graphed = losses(made, range(50))
    assert made.uses_graph and made.update_graph is not None, "the graphs were not captured"
    assert graphed == pytest.approx(eager, rel=2e-2)
    assert graphed[-1] < graphed[0] - 1


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_fp32_on_the_gpu_trains_as_on_the_cpu(optim: str) -> None:
    settings = ("precision=fp32", f"optim={optim}")
    gpu = losses(backend(config(*settings, "parallel.layer_spec=torch")), range(5))
    cpu = losses(backend(config(*settings, "parallel.device=cpu")), range(5), device="cpu")
    assert gpu == pytest.approx(cpu, rel=1e-3)


def test_fp8_ends_within_two_percent_of_bf16_after_200_steps() -> None:
    """The small factors of the default initialization begin with a plateau that rounding noise shortens; here they are larger."""
    bf16 = losses(backend(config("precision=bf16")), range(200))
    fp8 = losses(backend(config("precision=fp8_hybrid")), range(200))
    assert sum(bf16[-20:]) / 20 < 1.6, "nothing was learned"
    assert sum(fp8[-20:]) == pytest.approx(sum(bf16[-20:]), rel=2e-2)


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_fp8_layers_compute_with_the_weights_of_the_last_update(optim: str) -> None:
    """Large steps, so that any weight that is kept from before would show: the graph's loss against BF16 layers with the same weights."""
    made = backend(config("precision=fp8_hybrid", f"optim={optim}"))
    losses(made, range(30), lr=5e-3)
    found = losses(made, range(30, 31), lr=0.0)
    expected = losses(made, range(30, 31), lr=0.0, in_bf16=True)
    assert found == pytest.approx(expected, rel=1e-2)


def test_scales_have_the_same_names_at_all_lengths() -> None:
    """Short windows have an attention of their own; the next phase's longer ones load the same state."""
    shapes = []
    for seq_len in (8, 256):
        forget_fp8_state()
        made = backend(config("precision=fp8_hybrid"), micro_batch_size=2048 // seq_len, seq_len=seq_len)
        shapes.append({name: tensor.shape for name, tensor in scaling_tensors(made.model)})
    assert shapes[0] == shapes[1] and shapes[0]


def test_the_first_steps_can_leave_fp8_out() -> None:
    """Ten steps without it are those of a BF16 run, then FP8 takes over; its graph and that of BF16 are not the same."""
    bf16, fp8 = backend(config("precision=bf16")), backend(config("precision=fp8_hybrid"))
    expected = losses(bf16, range(20))
    found = losses(fp8, range(10), in_bf16=True)
    assert found == pytest.approx(expected[:10], rel=1e-3)
    graph = fp8.graph
    fp8.calibrate(*(x.cuda() for x in structured(10)))
    rest = losses(fp8, range(10, 20))
    assert fp8.uses_graph and fp8.graph is not graph
    assert rest != expected[10:]
    assert rest == pytest.approx(expected[10:], rel=5e-2)


@pytest.mark.parametrize("optim", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["bf16", "fp8_hybrid"])
def test_training_goes_on_from_a_checkpoint_with_all_its_state(tmp_path: Path, precision: str, optim: str) -> None:
    first = backend(config(f"precision={precision}", f"optim={optim}"))
    losses(first, range(20))
    save_shards(first.sharded_state(), tmp_path, 0)
    scales = {name: tensor.clone() for name, tensor in scaling_tensors(first.model)} if precision != "bf16" else {}
    assert bool(scales) == (precision != "bf16")
    expected = losses(first, range(20, 25))
    forget_fp8_state()
    second = backend(config(f"precision={precision}", f"optim={optim}"))
    ShardReader(tmp_path).load_into(second.sharded_state())
    second.after_load()
    loaded = dict(scaling_tensors(second.model)) if scales else {}
    assert loaded.keys() == scales.keys()
    for name, tensor in scales.items():
        assert torch.equal(loaded[name], tensor), name
    assert any(not torch.equal(t, torch.ones_like(t)) for n, t in scales.items() if n.endswith("scale")) or not scales
    assert losses(second, range(20, 25)) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("before", ["bf16", "fp8_hybrid parallel.fused_layers=false"])
def test_a_checkpoint_without_such_scales_goes_on_with_fresh_ones(tmp_path: Path, before: str) -> None:
    first = backend(config(*f"precision={before}".split()))
    losses(first, range(60))
    save_shards(first.sharded_state(), tmp_path, 0)
    expected = losses(first, range(60, 80))
    second = backend(config("precision=fp8_hybrid"))
    reader, state = ShardReader(tmp_path), second.sharded_state()
    held = without_absent_scales(state, reader.keys())
    assert len(held) < len(state)
    reader.load_into(held)
    second.after_load()
    second.prepare(16, 2, 128)
    assert losses(second, range(60, 80)) == pytest.approx(expected, rel=5e-2)


@pytest.mark.parametrize("fused", ["true", "false"])
def test_a_forward_between_steps_leaves_fp8_scales_as_they_were(fused: str) -> None:
    settings = config("precision=fp8_hybrid", f"parallel.fused_layers={fused}")
    made = backend(settings)
    losses(made, range(6))

    def forward() -> None:
        made.model.eval()
        with torch.no_grad():
            made.model(torch.full((4, 512), 7, device="cuda"), torch.full((4, 512), 8, device="cuda"))
        made.model.train()

    before = {name: tensor.clone() for name, tensor in scaling_tensors(made.model)}
    with scaling_state_kept(made.model, settings.precision):
        forward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in scaling_tensors(made.model))
    forward()
    changed = not all(torch.equal(tensor, before[name]) for name, tensor in scaling_tensors(made.model))
    assert changed == (fused == "false"), "Transformer Engine's modules note what they see without gradients too"
    assert losses(made, range(6, 9))[-1] < 20


def test_measuring_both_formats_leaves_no_trace() -> None:
    from yxanul_nemo.training.random_state import sharded_random_state

    forget_fp8_state()
    made = backend(config("precision=fp8_hybrid"))

    def everything() -> dict[str, torch.Tensor]:
        state = made.sharded_state() | sharded_random_state("cuda")
        return {s.key + str(s.global_offset): s.data.detach().clone() for s in sharded_tensors(state)}

    before = everything()
    assert any(name.startswith("fp8.") for name in before)
    assert all(0 < made.seconds_per_micro_batch(in_bf16) < 1 for in_bf16 in (False, True, False))
    after = everything()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert not made.graph and made.model.config.fp8
    found = losses(made, range(50))
    assert made.graph and found[-1] < found[0] - 1


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    made = backend(config("precision=bf16"))
    losses(made, range(3))
    before = [main.clone() for main in made.optimizer.mains]
    ids, labels = structured(3)
    with torch.no_grad():
        made.model.decoder.final_layernorm.weight.fill_(float("nan"))
    result = made.train_step(ids.cuda(), labels.cuda(), 1e-3, 1.0)
    assert not bool(result.applied)
    for main, old in zip(made.optimizer.mains, before, strict=True):
        assert torch.equal(main, old)


@pytest.mark.parametrize("precision", ["bf16", "fp8_hybrid"])
def test_a_snapshot_is_of_its_moment_whatever_is_trained_since(tmp_path: Path, precision: str) -> None:
    made = backend(config(f"precision={precision}"))
    snapshot = HostSnapshot(made.sharded_state())
    losses(made, range(5))
    for repeat in range(2):
        # Steps are queued behind one another; the copy must be of the last of them.
        losses(made, range(5 + repeat, 6 + repeat))
        snapshot.take(made.sharded_state())
        expected = {
            s.key + str(s.global_offset): s.data.detach().clone() for s in sharded_tensors(made.sharded_state())
        }
        losses(made, range(10, 12))
        (folder := tmp_path / str(repeat)).mkdir()
        snapshot.write(folder, 0)
        ShardReader(folder).load_into(made.sharded_state())
        for shard in sharded_tensors(made.sharded_state()):
            assert torch.equal(shard.data, expected[shard.key + str(shard.global_offset)]), shard.key
        made.after_load()


@pytest.mark.parametrize("graph", ["true", "false"])
def test_a_spike_changes_nothing_and_is_remembered(graph: str) -> None:
    guards = ("guards.spike_sigma=6", "guards.spike_window_steps=16")
    made = backend(config("precision=bf16", f"parallel.cuda_graph={graph}", *guards))
    losses(made, range(100))
    before, seen = [main.clone() for main in made.optimizer.mains], int(made.guard.count)
    ids = torch.randint(0, VOCAB, (2, 16, 128), device="cuda")
    result = made.train_step(ids, ids.flip(-1), 1e-3, 1.0)
    assert not bool(result.applied) and seen == 100 and int(made.guard.count) == 101
    assert float(result.loss) == pytest.approx(float(made.guard.history_2W[0, 100 % 16]))
    for main, old in zip(made.optimizer.mains, before, strict=True):
        assert torch.equal(main, old)
    ids, labels = structured(101)
    assert bool(made.train_step(ids.cuda(), labels.cuda(), 1e-3, 1.0).applied)


def test_random_states_of_a_gpu_come_back() -> None:
    from yxanul_nemo.training.random_state import restore_random_state, sharded_random_state

    losses(backend(config("precision=bf16")), range(2))
    states = sharded_random_state("cuda")
    drawn = torch.rand(8, device="cuda"), torch.rand(8)
    restore_random_state(states, "cuda")
    assert torch.equal(torch.rand(8, device="cuda"), drawn[0]) and torch.equal(torch.rand(8), drawn[1])


def losses_of_documents(made, seq_len: int, means: list[int], device: str = "cuda") -> list[float]:
    """A step for each mean length of documents."""
    out = []
    for step, mean in enumerate(means):
        ids, labels = structured(step, seq_len, document_tokens=mean)
        out.append(float(made.train_step(ids, labels, 1e-3, 1.0).loss))
    return out


@pytest.mark.parametrize("precision", ["bf16", "fp8_hybrid"])
@pytest.mark.parametrize("seq_len, tiles", [(64, "true"), (256, "true"), (256, "false")])
def test_graph_and_eager_train_alike_inside_documents(precision: str, seq_len: int, tiles: str) -> None:
    """Other documents in each of 20 steps: the graph must read them anew."""
    means = [300, 40, 1000, 90] * 5
    settings = (f"precision={precision}", "data.document_mask=true", f"parallel.tiled_attention={tiles}")
    eager_backend = backend(config(*settings, "parallel.cuda_graph=false"), seq_len=seq_len)
    eager = losses_of_documents(eager_backend, seq_len, means)
    made = backend(config(*settings), seq_len=seq_len)
    graphed = losses_of_documents(made, seq_len, means)
    assert made.graph and made.update_graph is not None, "the graphs were not captured"
    by_tiles = tiles == "true" and torch.cuda.get_device_capability()[0] == 9
    assert (made.room is not None) == (seq_len > 128 and not by_tiles)
    assert graphed == pytest.approx(eager, rel=2e-2)
    assert graphed[-1] < graphed[0] - 0.3


def test_masked_steps_on_the_gpu_are_those_of_the_dense_mask_on_the_cpu() -> None:
    """Small documents, so that whole windows would show."""
    mask, means = "data.document_mask=true", [15] * 5
    gpu = losses_of_documents(backend(config("precision=bf16", mask), 16, 256), 256, means)
    on_cpu = backend(config("precision=fp32", "parallel.device=cpu", mask), 16, 256)
    assert gpu == pytest.approx(losses_of_documents(on_cpu, 256, means, "cpu"), rel=2e-2)
    in_torch = backend(config("precision=fp32", "parallel.layer_spec=torch", mask), 16, 256)
    again = backend(config("precision=fp32", "parallel.device=cpu", mask), 16, 256)
    expected = losses_of_documents(again, 256, means, "cpu")
    assert losses_of_documents(in_torch, 256, means) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp8_hybrid"])
def test_a_batch_with_more_documents_than_room_gets_a_new_graph(precision: str) -> None:
    means = [1000, 1000, 1000, 8, 1000, 1000]
    settings = (f"precision={precision}", "data.document_mask=true", "parallel.tiled_attention=false")
    eager = losses_of_documents(backend(config(*settings, "parallel.cuda_graph=false"), 16, 256), 256, means)
    made = backend(config(*settings), 16, 256)
    before = losses_of_documents(made, 256, means[:3])
    graph, room = made.graph, made.documents.room
    # 16 windows of 256 tokens in documents of 8: about 520.
    ids, labels = structured(3, 256, document_tokens=8)
    scales = {name: tensor.clone() for name, tensor in scaling_tensors(made.model)} if precision != "bf16" else {}
    made.make_room(ids)
    assert made.documents.room >= 512 > room and not made.graph
    assert all(torch.equal(tensor, scales[name]) for name, tensor in scaling_tensors(made.model) if name in scales)
    found = [*before, float(made.train_step(ids.cuda(), labels.cuda(), 1e-3, 1.0).loss)]
    assert made.graph and made.graph is not graph
    graph = made.graph
    for step in (4, 5):
        ids, labels = structured(step, 256, document_tokens=means[step])
        made.make_room(ids)
        found.append(float(made.train_step(ids.cuda(), labels.cuda(), 1e-3, 1.0).loss))
    assert made.graph is graph, "the room is kept"
    assert found == pytest.approx(eager, rel=2e-2)
