"""The attention of the GPU's layers around what Transformer Engine computes, with torch in its place: in Triton's interpreter on a CPU."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is installed on Linux hosts only")
from tests.kernels.interpreter import run_interpreted
from tests.model.test_documents import EOS, SHAPE, VOCAB, with_random_eos
from yxanul_nemo.model.documents import Documents

ROOM = 64


def test_listed_and_masked_documents_are_those_of_the_torch_layers() -> None:
    assert run_interpreted(__file__).split() == ["listed", "masked"]


def interpreted() -> None:
    from yxanul_nemo.model.build import build_model, reference_precision
    from yxanul_nemo.model.gpt import YxanulGPT

    reference = build_model(SHAPE, VOCAB, *reference_precision(), seed=3)
    ids_BT = with_random_eos(3, 40, 7)
    labels_BT = ids_BT.roll(-1, dims=1)
    expected_BTV = reference(ids_BT, documents=Documents(EOS))
    reference(ids_BT, labels_BT, Documents(EOS)).mean().backward()
    for name, lists in (("listed", True), ("masked", False)):
        model = in_gpu_layers(reference)
        YxanulGPT.lists_documents = lambda self, seq_len, lists=lists: lists
        documents = Documents(EOS, ROOM)
        torch.testing.assert_close(model(ids_BT, documents=documents), expected_BTV, rtol=1e-4, atol=1e-4)
        model(ids_BT, labels_BT, documents).mean().backward()
        for (key, weight), (_, other) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
            assert (weight.grad - other.grad).norm() / other.grad.norm() < 1e-4, key
        print(name)


def in_gpu_layers(reference: torch.nn.Module) -> torch.nn.Module:
    """The model once more with `WindowSelfAttention`, and with torch where Transformer Engine would be called."""
    from yxanul_nemo.model import gpt, layers
    from yxanul_nemo.model.attention import WindowSelfAttention

    class ListedAttention(layers.TorchCoreAttention):
        """Takes Transformer Engine's packed format: query [N, heads, D], key and value [N, groups, D], documents by their ends."""

        def forward(self, query, key, value, attention_mask=None, attn_mask_type=None, packed_seq_params=None):
            if packed_seq_params is None:
                assert attention_mask is None or attn_mask_type.name == "arbitrary"
                return super().forward(query, key, value, attention_mask)
            assert packed_seq_params.qkv_format == "thd" and attention_mask is None
            out_NHD = torch.zeros_like(query)
            ends = packed_seq_params.cu_seqlens_q.tolist()
            for first, end in itertools.pairwise(ends):
                if end > first:
                    q_HTD, k_GTD, v_GTD = (x[first:end].transpose(0, 1) for x in (query, key, value))
                    alone = F.scaled_dot_product_attention(q_HTD, k_GTD, v_GTD, is_causal=True, enable_gqa=True)
                    out_NHD[first:end] = alone.transpose(0, 1)
            return out_NHD.flatten(1)

    def spec(config):
        block = torch_block_spec(config)
        attention = block.layer_specs[0].submodules.self_attention
        inner = dataclasses.replace(attention.submodules, core_attention=ListedAttention)
        attention = dataclasses.replace(attention, module=WindowSelfAttention, submodules=inner)
        layer = block.layer_specs[0]
        layer = dataclasses.replace(layer, submodules=dataclasses.replace(layer.submodules, self_attention=attention))
        return dataclasses.replace(block, layer_specs=[layer] * len(block.layer_specs))

    torch_block_spec = layers.torch_block_spec
    gpt.torch_block_spec = spec
    model = gpt.YxanulGPT(SHAPE, reference.config, VOCAB, "torch")
    gpt.torch_block_spec = torch_block_spec
    model.with_te = True
    model.load_state_dict(reference.state_dict())
    return model
