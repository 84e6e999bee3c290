"""Muon in whole updates: against NVIDIA's Emerging-Optimizers, Megatron-core's own unpacking, and what must and must not change weights."""

import math

import pytest
import torch

pytest.importorskip("triton", reason="Triton, which Emerging-Optimizers needs, is installed on Linux hosts only")
from emerging_optimizers.orthogonalized_optimizers import muon, muon_utils

from tests.ranks import run_ranks
from tests.training import gpu_steps
from yxanul_nemo.config.load import compose, keys_of, parse
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.config.training import OptimConfig

LR, WEIGHT_DECAY, GRAD_CLIP = 0.02, 0.1, 0.05
STEPS = 3
PLAIN = ("optim.muon.neuron_norm=false", "optim.muon.cautious_decay=false")
SHAPE = (
    "model.num_layers=2", "model.hidden_size=64", "model.ffn_hidden_size=96", "model.num_attention_heads=4", "model.kv_groups=2",
    "model.head_dim=16", "model.embedding_rank=32", "parallel.cpu_threads=1",
)  # fmt: skip


def config(*overrides: str) -> RunConfig:
    return parse(compose(["optim=muon", f"optim.weight_decay={WEIGHT_DECAY}", *SHAPE, *overrides]))


def backend(settings: RunConfig):
    from yxanul_nemo.model.build import build_model
    from yxanul_nemo.training.build import make_backend

    model = build_model(settings.model, 301, settings.precision, settings.parallel, seed=5)
    made = make_backend(model, settings, settings.parallel.device)
    if settings.parallel.device == "cuda":
        made.prepare(4, 2, 16)
    return made


def batch(step: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randint(0, 301, (2, 4, 17), generator=torch.Generator().manual_seed(step)).to(device)
    return x[..., :-1].contiguous(), x[..., 1:].contiguous()


def pieces(tensor: torch.Tensor, name: str, shape) -> list[torch.Tensor]:
    """What an optimizer should see as matrices of their own, by the export's unpacking."""
    from yxanul_nemo.export.fold import split_qkv

    if name == "qkv":
        return [piece.clone() for piece in split_qkv(tensor, shape)]
    return [piece.clone() for piece in (tensor.chunk(2) if name == "fc1" else (tensor,))]


def matrices(made) -> list[tuple[str, torch.nn.Parameter]]:
    from yxanul_nemo.model.matrices import layer_matrices

    return [(kind.name, param) for kind in layer_matrices(made.model) for param in kind.params]


def weights_and_gradients(settings: RunConfig) -> tuple[list, list[list], list]:
    """Pieces of all layers' matrices before, their clipped gradients in each step, and the pieces after."""
    made = backend(settings)
    shape = settings.model
    split = lambda of: [piece for name, param in matrices(made) for piece in pieces(of(param), name, shape)]  # noqa: E731
    before, gradients = split(lambda p: p.detach()), []
    for step in range(STEPS):
        result = made.train_step(*batch(step), LR, GRAD_CLIP)
        clip = max(1.0, (float(result.grad_norm) + 1e-6) / GRAD_CLIP)
        assert clip > 1
        gradients.append([grad / clip for grad in split(lambda p: p.main_grad)])
    return before, gradients, split(lambda p: p.detach())


def against_emerging(nesterov: bool, momentum: float) -> None:
    """Muon as Megatron-core would have it: update scaled by sqrt(longer side) and 0.2."""
    switches = (f"optim.muon.nesterov={str(nesterov).lower()}", f"optim.muon.momentum={momentum}")
    before, gradients, after = weights_and_gradients(config(*PLAIN, *switches))
    params = [torch.nn.Parameter(piece.clone()) for piece in before]
    theirs = muon.Muon(
        params, LR, momentum, WEIGHT_DECAY, nesterov=nesterov, coefficient_type="polar_express", num_ns_steps=5,
        scale_mode="spectral", extra_scale_factor=0.2, fp32_matmul_prec="highest",
    )  # fmt: skip
    for of_step in gradients:
        for param, grad in zip(params, of_step, strict=True):
            param.grad = grad
        theirs.step()
    assert len(params) == 2 * 7
    for param, found, old in zip(params, after, before, strict=True):
        torch.testing.assert_close(found, param.detach(), rtol=1e-4, atol=1e-5)
        assert (found - old).norm() > 0.01 * old.norm()


@pytest.mark.parametrize(("nesterov", "momentum"), [(True, 0.95), (False, 0.8)])
def test_updates_are_those_of_emerging_optimizers(nesterov: bool, momentum: float) -> None:
    run_ranks(against_emerging, 1, nesterov, momentum)


def against_a_description() -> None:
    """NorMuon and cautious decay, written down for one matrix at a time in FP64."""
    before, gradients, after = weights_and_gradients(config("optim.muon.neuron_beta=0.8"))
    for number, (weight, found) in enumerate(zip(before, after, strict=True)):
        weight, average = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
        squares = torch.zeros(len(weight), dtype=torch.float64)
        for of_step in gradients:
            grad = of_step[number].double()
            average = 0.95 * average + 0.05 * grad
            ahead = 0.95 * average + 0.05 * grad
            update = muon_utils.newton_schulz(ahead.float(), 5, "polar_express").double()
            size = update.norm()
            squares = 0.8 * squares + 0.2 * update.square().mean(1)
            update = update / squares.sqrt()[:, None]
            update *= 0.2 * math.sqrt(max(weight.shape)) * size / update.norm()
            decay = WEIGHT_DECAY * weight * (weight * update >= 0)
            weight = weight - LR * (update + decay)
        torch.testing.assert_close(found.double(), weight, rtol=1e-3, atol=2e-5)


def test_neuron_norm_and_cautious_decay_are_as_described() -> None:
    run_ranks(against_a_description, 1)


def unpacked() -> None:
    """Rows of the mixed projection by where Megatron-core's attention has them, and of gate and up by its checkpoints' halves."""
    from yxanul_nemo.model.matrices import layer_matrices
    from yxanul_nemo.model.sharding import sharded_tensors

    model = backend(config()).model
    qkv, _, fc1, _ = layer_matrices(model)
    attention = model.decoder.layers[0].self_attention
    with torch.no_grad():
        weight = attention.linear_qkv.weight.zero_()
        weight[:, 0] = torch.arange(len(weight))
    hidden = torch.zeros(1, 1, 64)
    hidden[..., 0] = 1
    heads = attention.get_query_key_value_tensors(hidden)[:3]
    rows = [part.detach().flatten().round().long().tolist() for part in heads]
    assert list(qkv.piece_order) == [row for part in rows for row in part]
    sizes = [piece.rows for piece in qkv.pieces for _ in range(piece.count)]
    assert sizes == [len(part) for part in rows]
    assert torch.equal(qkv.places.long()[torch.tensor(qkv.piece_order)], torch.arange(len(qkv.piece_order)))
    halves = [
        shard for shard in sharded_tensors(model.sharded_state_dict()) if shard.data.untyped_storage().data_ptr()
        == fc1.params[0].untyped_storage().data_ptr() and "linear_fc1.weight" in shard.key and shard.global_offset[0] == 0
    ]  # fmt: skip
    assert [shard.local_shape[0] for shard in halves] == [p.rows for p in fc1.pieces for _ in range(p.count)]


def test_matrices_are_what_megatron_takes_apart() -> None:
    run_ranks(unpacked, 1)


def state_of(made) -> dict[str, torch.Tensor]:
    from yxanul_nemo.model.sharding import sharded_tensors

    return {shard.key + str(shard.global_offset): shard.data.clone() for shard in sharded_tensors(made.sharded_state())}


def bad_steps(device: str) -> None:
    """Not finite and, with a guard, a spike: weights, momentum and mean squares stay as they are."""
    made = backend(config("guards.spike_sigma=6", "guards.spike_window_steps=16", *on(device)))
    for step in range(12):
        made.train_step(*batch(step % 2, device), LR, 1.0)
    before = state_of(made)
    assert any("momentum" in key for key in before) and any("neuron_square" in key for key in before)
    kept = made.model.decoder.final_layernorm.weight.detach().clone()
    for factor in (float("nan"), 1e4):
        with torch.no_grad():
            made.model.decoder.final_layernorm.weight.mul_(factor)
        assert not bool(made.train_step(*batch(0, device), LR, 1.0).applied)
        with torch.no_grad():
            made.model.decoder.final_layernorm.weight.copy_(kept)
        after = state_of(made)
        assert before.keys() == after.keys()
        assert [key for key in before if not torch.equal(before[key], after[key]) and not key.startswith("guard")] == []


def on(device: str) -> tuple[str, ...]:
    if device == "cpu":
        return ("precision=fp32", "parallel.device=cpu")
    return ("precision=bf16", *gpu_steps.SHAPE)


def test_bad_steps_change_nothing() -> None:
    run_ranks(bad_steps, 1, "cpu")


CHANGES = {
    "lr": "optim.lr=0.01",
    "min_lr_ratio": "optim.min_lr_ratio=0.5",
    "warmup_tokens": "optim.warmup_tokens=0.9",
    "decay": "optim.decay=cosine",
    "wsd_decay_ratio": "optim.wsd_decay_ratio=0.9",
    "beta1": "optim.beta1=0.5",
    "beta2": "optim.beta2=0.5",
    "eps": "optim.eps=1e-2",
    "weight_decay": "optim.weight_decay=0.5",
    "muon": "optim.muon=null",
    "muon.momentum": "optim.muon.momentum=0.5",
    "muon.nesterov": "optim.muon.nesterov=false",
    "muon.neuron_norm": "optim.muon.neuron_norm=false",
    "muon.neuron_beta": "optim.muon.neuron_beta=0.5",
    "muon.cautious_decay": "optim.muon.cautious_decay=false",
    "muon.adamw_lr_factor": "optim.muon.adamw_lr_factor=0.5",
}


def changed_by(device: str) -> dict[str, float]:
    """For each key the distance of the weights after a few steps from those without the change, as a share of the way."""
    from yxanul_nemo.curriculum.schedule import learning_rate

    def flat(of: dict[int, torch.Tensor], made) -> torch.Tensor:
        return torch.cat([of[id(p)].detach().flatten() for p in made.model.parameters()])

    def trained(*overrides: str) -> tuple[torch.Tensor, torch.Tensor]:
        settings = config(*on(device), "optim.lr=0.02", *overrides)
        made = backend(settings)
        mains = {id(part.param): part.main for part in made.optimizer.flat.parts}
        start = flat(mains, made).clone()
        for step in range(STEPS):
            rate = learning_rate(settings.optim, 50 + step, 100)
            made.train_step(*batch(step, device), rate, 1.0)
        assert device == "cpu" or made.update_graph is not None
        made.close()
        return flat(mains, made), start

    expected: dict[tuple[str, ...], tuple[torch.Tensor, torch.Tensor]] = {}
    found = {}
    for key, change in CHANGES.items():
        base = ("optim.decay=wsd",) if key == "wsd_decay_ratio" else ()
        if base not in expected:
            expected[base] = trained(*base)
        weights, start = expected[base]
        found[key] = float((trained(*base, change)[0] - weights).norm() / (weights - start).norm())
    return found


def check_changes(found: dict[str, float]) -> None:
    assert set(found) == set(keys_of(OptimConfig))
    assert {key: share for key, share in found.items() if not share > 1e-4} == {}


def test_every_key_changes_the_weights() -> None:
    check_changes(run_ranks(changed_by, 1, "cpu")[0])


@pytest.mark.gpu
def test_every_key_changes_the_weights_under_the_graph() -> None:
    check_changes(run_ranks(changed_by, 1, "cuda", on_gpus=True)[0])


@pytest.mark.gpu
def test_bad_steps_change_nothing_under_the_graph() -> None:
    run_ranks(bad_steps, 1, "cuda", on_gpus=True)
