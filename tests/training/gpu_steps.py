"""A small model on a GPU, and steps on something that it can learn."""

import torch

from yxanul_nemo.config.load import compose, parse
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.model.build import build_model

VOCAB, EOS = 4001, 4000
SHAPE = (
    "model.num_layers=4", "model.hidden_size=256", "model.ffn_hidden_size=512", "model.num_attention_heads=4",
    "model.kv_groups=2", "model.head_dim=64", "model.embedding_rank=128", "model.embedding_init_std=0.1", "parallel.device=cuda",
)  # fmt: skip


def config(*overrides: str) -> RunConfig:
    return parse(compose([*SHAPE, *overrides]))


def backend(settings: RunConfig, micro_batch_size: int = 16, seq_len: int = 128):
    from yxanul_nemo.training.build import make_backend

    model = build_model(settings.model, VOCAB, settings.precision, settings.parallel, seed=1, seq_len=seq_len)
    made = make_backend(model, settings, settings.parallel.device, EOS)
    if settings.parallel.device == "cuda":
        made.prepare(micro_batch_size, 2, seq_len)
    return made


def structured(
    step: int, seq_len: int = 128, windows: int = 32, document_tokens: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Something that can be learned: each token is a fixed function of the one before, with noise, in documents of this mean length."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.empty(windows, seq_len + 1, dtype=torch.long)
    tokens[:, 0] = torch.randint(0, VOCAB, (windows,), generator=generator)
    for t in range(seq_len):
        noise = torch.randint(0, VOCAB, (windows,), generator=generator)
        use_noise = torch.rand(windows, generator=generator) < 0.1
        tokens[:, t + 1] = torch.where(use_noise, noise, (tokens[:, t] * 31 + 7) % 97)
    if document_tokens is not None:
        tokens[torch.rand(tokens.shape, generator=generator) < 1 / document_tokens] = EOS
    halves = tokens.view(2, windows // 2, seq_len + 1)
    return halves[..., :-1].contiguous(), halves[..., 1:].contiguous()


def losses(made, steps: range, lr: float = 1e-3, device: str = "cuda", in_bf16: bool = False) -> list[float]:
    out = []
    for step in steps:
        ids, labels = structured(step)
        out.append(float(made.train_step(ids.to(device), labels.to(device), lr, 1.0, in_bf16=in_bf16).loss))
    return out
