"""Transformer Engine's layers against the FP32 reference, at each length of the curriculum (needs a GPU)."""

import os

import pytest
import torch

from yxanul_nemo.config.model import ModelConfig
from yxanul_nemo.config.training import ParallelConfig, PrecisionConfig
from yxanul_nemo.model.build import build_model, reference_precision
from yxanul_nemo.model.documents import Documents, count_documents, room_for
from yxanul_nemo.model.gpt import YxanulGPT

pytestmark = pytest.mark.gpu

VOCAB, EOS = 4001, 7
SHAPE = ModelConfig(
    name="t", num_layers=4, hidden_size=256, ffn_hidden_size=512, num_attention_heads=4, kv_groups=2, head_dim=64,
    embedding_rank=128, max_position_embeddings=2048,
)  # fmt: skip
LENGTHS = (8, 16, 32, 64, 128, 256, 512, 768, 1536, 2048)


def build(
    precision: str,
    spec: str = "te",
    device: str = "cuda",
    op_fuser: bool = True,
    seq_len: int = 256,
    tiled_attention: bool = True,
) -> YxanulGPT:
    # Megatron-core writes its choice of attention into these and refuses another one in the same process.
    for variable in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        os.environ.pop(variable, None)
    parallel = ParallelConfig(device=device, layer_spec=spec, op_fuser=op_fuser, tiled_attention=tiled_attention)
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
@pytest.mark.parametrize("tiled_attention", [False, True])
@pytest.mark.parametrize("seq_len", LENGTHS)
def test_bf16_logits_and_gradients_follow_fp32(
    reference: YxanulGPT, seq_len: int, tiled_attention: bool, op_fuser: bool
) -> None:
    model = build("bf16", op_fuser=op_fuser, seq_len=seq_len, tiled_attention=tiled_attention)
    assert_follows(model, reference, *batch(seq_len))


def assert_follows(
    model: YxanulGPT,
    reference: YxanulGPT,
    ids_BT: torch.Tensor,
    labels_BT: torch.Tensor,
    documents: Documents | None = None,
) -> None:
    """Logits, mean loss and gradients are the reference's up to BF16's rounding."""
    assert relative(model(ids_BT, documents=documents), reference(ids_BT, documents=documents)) < 2e-2
    reference.zero_grad()
    loss = model(ids_BT, labels_BT, documents).mean()
    expected = reference(ids_BT, labels_BT, documents).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=2e-3)
    loss.backward()
    expected.backward()
    # Both call a layer's first norm differently: it is part of the projection after it, or of the fused operations.
    ours = sorted((name, p.grad) for name, p in model.named_parameters() if p.dim() > 1)
    theirs = sorted((name, p.grad) for name, p in reference.named_parameters() if p.dim() > 1)
    for (name, grad), (other_name, expected_grad) in zip(ours, theirs, strict=True):
        assert name == other_name
        assert relative(grad, expected_grad) < 2e-2, name


def batch_of_documents(seq_len: int) -> tuple[torch.Tensor, torch.Tensor, Documents]:
    """Documents of a fifth of a window, or of 20 tokens; some windows begin or end with EOS, or have several in a row, or none."""
    ids_BT, labels_BT = batch(seq_len)
    generator = torch.Generator().manual_seed(seq_len)
    ends_BT = (torch.rand(ids_BT.shape, generator=generator) < min(5 / seq_len, 0.05)).cuda()
    ends_BT[0, :3] = ends_BT[0, -1] = True
    ends_BT[1] = False
    ids_BT = ids_BT.masked_fill(ends_BT, EOS)
    labels_BT[:, :-1] = ids_BT[:, 1:]
    return ids_BT, labels_BT, Documents(EOS, room_for(count_documents(ids_BT[None], EOS)))


@pytest.mark.parametrize("tiled_attention", [False, True])
@pytest.mark.parametrize("seq_len", LENGTHS)
def test_documents_in_bf16_follow_the_dense_mask_in_fp32(
    reference: YxanulGPT, seq_len: int, tiled_attention: bool
) -> None:
    ids_BT, labels_BT, documents = batch_of_documents(seq_len)
    model = build("bf16", seq_len=seq_len, tiled_attention=tiled_attention)
    by_tiles = tiled_attention and torch.cuda.get_device_capability()[0] == 9
    assert model.lists_documents(seq_len) == (seq_len > 128 and not by_tiles)
    assert_follows(model, reference, ids_BT, labels_BT, documents)
    assert relative(model(ids_BT), reference(ids_BT, documents=documents)) > 5e-2, "the mask matters"
    more = Documents(EOS, 4 * documents.room)
    assert relative(model(ids_BT, documents=more), model(ids_BT, documents=documents)) < 1e-3


@pytest.mark.parametrize("seq_len", [64, 256])
def test_documents_in_fp32_follow_the_dense_mask(reference: YxanulGPT, seq_len: int) -> None:
    """Without the kernels of BF16: unfused attention with the dense mask."""
    ids_BT, labels_BT, documents = batch_of_documents(seq_len)
    assert_follows(build("fp32", seq_len=seq_len), reference, ids_BT, labels_BT, documents)


@pytest.mark.parametrize("seq_len", [64, 256, 2048])
def test_other_documents_keep_their_bits_when_one_changes(seq_len: int) -> None:
    ids_BT = batch(seq_len)[0].clamp(min=EOS + 2)
    third = seq_len // 3
    ids_BT[:, third] = ids_BT[:, 2 * third] = EOS
    documents = Documents(EOS, room_for(count_documents(ids_BT[None], EOS)))
    changed_BT = ids_BT.clone()
    changed_BT[1, 2 * third - 2 : 2 * third] = EOS + 1
    model = build("bf16", seq_len=seq_len)
    with torch.no_grad():
        same_BT = (model(changed_BT, documents=documents) == model(ids_BT, documents=documents)).all(dim=-1)
    assert not same_BT[1, 2 * third - 2 : 2 * third].any()
    same_BT[1, 2 * third - 2 : 2 * third] = True
    assert same_BT.all()


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
