"""The architecture once more in plain torch, straight from its description: the reference that the model is checked against."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from yxanul_nemo.config.model import ModelConfig
from yxanul_nemo.export.fold import split_qkv


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x_BNTD: Tensor, base: float, first_position: int = 0) -> Tensor:
    """Rotary embedding, rotate-half: pairs are (i, i + D/2)."""
    n_time, dim = x_BNTD.shape[-2:]
    frequencies = base ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.outer(torch.arange(first_position, first_position + n_time, dtype=torch.float64), frequencies)
    cos, sin = angles.cos().to(x_BNTD), angles.sin().to(x_BNTD)
    a, b = x_BNTD.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class PlainGPT(nn.Module):
    """MHA over repeated keys and values, explicit mask and softmax, two embedding factors used at both ends."""

    def __init__(self, shape: ModelConfig, state: dict[str, Tensor]):
        super().__init__()
        self.shape = shape
        self.w = nn.ParameterDict()
        for name, tensor in state.items():
            self.w[name.replace(".", "/")] = nn.Parameter(tensor.detach().clone())

    def weight(self, name: str) -> Tensor:
        """A weight by Megatron's name."""
        return self.w[name.replace(".", "/")]

    def forward(self, ids_BT: Tensor, vocab_size: int, first_position: int = 0) -> Tensor:
        """Logits [B, T, vocab_size]."""
        s = self.shape
        table = self.weight("embedding.word_embeddings.weight")[:vocab_size]
        projection = self.weight("embedding.projection.weight")
        x = F.embedding(ids_BT, table) @ projection.T
        n_batch, n_time, _ = x.shape
        hidden_future = torch.ones(n_time, n_time, dtype=torch.bool).triu(1)
        for i in range(s.num_layers):
            p = f"decoder.layers.{i}."
            y = rms_norm(x, self.weight(f"{p}input_layernorm.weight"), s.norm_eps)
            q_w, k_w, v_w = split_qkv(self.weight(f"{p}self_attention.linear_qkv.weight"), s)
            q, k, v = ((y @ w.T).view(n_batch, n_time, -1, s.head_dim).transpose(1, 2) for w in (q_w, k_w, v_w))
            q, k = rotate(q, s.rope_base, first_position), rotate(k, s.rope_base, first_position)
            repeats = s.num_attention_heads // s.kv_groups
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
            scores = (q @ k.transpose(-1, -2) / s.head_dim**0.5).masked_fill(hidden_future, float("-inf"))
            attended = (scores.softmax(-1) @ v).transpose(1, 2).reshape(n_batch, n_time, -1)
            x = x + attended @ self.weight(f"{p}self_attention.linear_proj.weight").T
            y = rms_norm(x, self.weight(f"{p}pre_mlp_layernorm.weight"), s.norm_eps)
            gate, up = self.weight(f"{p}mlp.linear_fc1.weight").chunk(2)
            x = x + (F.silu(y @ gate.T) * (y @ up.T)) @ self.weight(f"{p}mlp.linear_fc2.weight").T
        x = rms_norm(x, self.weight("decoder.final_layernorm.weight"), s.norm_eps)
        return (x @ projection) @ table.T
