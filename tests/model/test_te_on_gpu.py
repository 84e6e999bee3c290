"""Transformer Engine's layers against the FP32 reference, at each length of the curriculum (needs a GPU)."""

import os

import pytest
import torch

from yxanul_nemo.config.model import ModelConfig
from yxanul_nemo.config.training import ParallelConfig, PrecisionConfig
from yxanul_nemo.model.build import build_model, reference_precision
from yxanul_nemo.model.gpt import YxanulGPT

pytestmark = pytest.mark.gpu

VOCAB = 4001
SHAPE = ModelConfig(
    name="t", num_layers=4, hidden_size=256, ffn_hidden_size=512, num_attention_heads=4, kv_groups=2, head_dim=64,
    embedding_rank=128, max_position_embeddings=2048,
)  # fmt: skip
LENGTHS = (8, 16, 32, 64, 128, 256, 512, 768, 1536, 2048)


def build(
    precision: str, spec: str = "te", device: str = "cuda", op_fuser: bool = True, seq_len: int = 256
) -> YxanulGPT:
    # Megatron-core writes its choice of attention into these and refuses another one in the same process.
    for variable in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        os.environ.pop(variable, None)
    parallel = ParallelConfig(device=device, layer_spec=spec, op_fuser=op_fuser)
    return build_model(SHAPE, VOCAB, PrecisionConfig(name=precision), parallel, seed=1, seq_len=seq_len)


@pytest.fixture(scope="module")
def reference() -> YxanulGPT:
    """FP32, plain torch layers, on the GPU."""
    return build("fp32", spec="torch")


def batch(seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seq_len)
    tokens = torch.randint(0, VOCAB, (max(2, 4096 // seq_len), seq_len + 1), generator=generator).cuda()
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def relative(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return ((ours.double() - reference.double()).norm() / reference.double().norm()).item()


def test_torch_layers_on_the_gpu_equal_those_on_the_cpu(reference: YxanulGPT) -> None:
    on_cpu = build_model(SHAPE, VOCAB, *reference_precision(), seed=1)
    ids_BT, _ = batch(64)
    assert relative(reference(ids_BT).cpu(), on_cpu(ids_BT.cpu())) < 1e-4


@pytest.mark.parametrize("op_fuser", [False, True])
@pytest.mark.parametrize("seq_len", LENGTHS)
def test_bf16_logits_and_gradients_follow_fp32(reference: YxanulGPT, seq_len: int, op_fuser: bool) -> None:
    model = build("bf16", op_fuser=op_fuser, seq_len=seq_len)
    ids_BT, labels_BT = batch(seq_len)
    assert relative(model(ids_BT), reference(ids_BT)) < 2e-2
    reference.zero_grad()
    loss, expected = model(ids_BT, labels_BT).mean(), reference(ids_BT, labels_BT).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=2e-3)
    loss.backward()
    expected.backward()
    # Both call a layer's first norm differently: it is part of the projection after it, or of the fused operations.
    ours = sorted((name, p.grad) for name, p in model.named_parameters() if p.dim() > 1)
    theirs = sorted((name, p.grad) for name, p in reference.named_parameters() if p.dim() > 1)
    for (name, grad), (other_name, expected_grad) in zip(ours, theirs, strict=True):
        assert name == other_name
        assert relative(grad, expected_grad) < 2e-2, name


@pytest.mark.parametrize("precision", ["fp8_hybrid", "fp8_e4m3", "fp8_current"])
def test_fp8_loss_follows_fp32(reference: YxanulGPT, precision: str) -> None:
    model = build(precision)
    ids_BT, labels_BT = batch(256)
    # Delayed scales come from the passes before.
    for _ in range(3):
        loss = model(ids_BT, labels_BT).mean()
        loss.backward()
    assert loss.item() == pytest.approx(reference(ids_BT, labels_BT).mean().item(), rel=2e-2)


def test_mxfp8_is_refused_before_blackwell() -> None:
    from yxanul_nemo.errors import UserError

    if torch.cuda.get_device_capability() >= (10, 0):
        pytest.skip("this GPU has MXFP8")
    with pytest.raises(UserError, match="a Blackwell GPU"):
        build("mxfp8")
