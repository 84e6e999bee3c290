"""The whole training step of the 197M model beside what one would otherwise train it with, in one run on one GPU.

    python -m benchmarks.peers [--seq-lens 2048 128] [--micro-batch-tokens 32768] [--only product-fp8 torch-cce ...]

Every rival has FP32 main weights and moments, BF16 products, clipping and fused AdamW, and gets the same number of tokens in a step.

torch-*       plain torch layers with torch.compile (each block compiled once), autocast and the same factorized tied embedding, with
              `cut-cross-entropy` (`pip install cut-cross-entropy`) or with logits in chunks that are computed again in backward
hugging-face  LlamaForCausalLM under torch.compile; its embedding is folded to [vocabulary, 768]
megatron-*    Megatron-core's GPTModel with its Transformer Engine layers, its own embedding [vocabulary, 768], loss and optimizer,
              without CUDA graphs
product-*     this project's step, with and without CUDA graphs

A contender whose micro-batch does not fit into memory gets half of it, and that is shown.
"""

import argparse
import gc
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from yxanul_nemo.config.load import compose, parse
from yxanul_nemo.config.model import ModelConfig
from yxanul_nemo.files import write_json_atomic
from yxanul_nemo.machine.environment import describe_environment
from yxanul_nemo.machine.runtime import init_process_groups
from yxanul_nemo.model.build import build_model
from yxanul_nemo.model.fp8_state import forget_fp8_state
from yxanul_nemo.training.build import make_backend
from yxanul_nemo.training.cuda_backend import CudaBackend

VOCAB_SIZE, PADDED_ROWS = 200_005, 200_064
WARMUP_STEPS, TIMED_STEPS = 4, 12
CHUNK_TOKENS = 4096
Step = Callable[[Tensor, Tensor], Tensor]
"""One optimizer step on (ids, labels) [accumulation, windows, seq_len]; returns its loss."""


class Attention(nn.Module):
    """Causal grouped-query attention with RoPE."""

    def __init__(self, shape: ModelConfig):
        super().__init__()
        self.heads, self.groups, self.head_dim = shape.num_attention_heads, shape.kv_groups, shape.head_dim
        width = (self.heads + 2 * self.groups) * self.head_dim
        self.qkv = nn.Linear(shape.hidden_size, width, bias=False)
        self.out = nn.Linear(self.heads * self.head_dim, shape.hidden_size, bias=False)

    def forward(self, x_BTH: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        """[B, T, hidden] -> [B, T, hidden]."""
        batch, tokens, _ = x_BTH.shape
        sizes = [n * self.head_dim for n in (self.heads, self.groups, self.groups)]
        q, k, v = (
            y.view(batch, tokens, -1, self.head_dim).transpose(1, 2) for y in self.qkv(x_BTH).split(sizes, dim=-1)
        )
        q, k = (y * cos_TD + torch.cat((-y.chunk(2, -1)[1], y.chunk(2, -1)[0]), dim=-1) * sin_TD for y in (q, k))
        y = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, -1))


class Block(nn.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, shape: ModelConfig):
        super().__init__()
        self.attention = Attention(shape)
        self.norm1, self.norm2 = (nn.RMSNorm(shape.hidden_size, eps=shape.norm_eps) for _ in range(2))
        self.gate_up = nn.Linear(shape.hidden_size, 2 * shape.ffn_hidden_size, bias=False)
        self.down = nn.Linear(shape.ffn_hidden_size, shape.hidden_size, bias=False)

    def forward(self, x_BTH: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        """[B, T, hidden] -> [B, T, hidden]."""
        x_BTH = x_BTH + self.attention(self.norm1(x_BTH), cos_TD, sin_TD)
        gate, up = self.gate_up(self.norm2(x_BTH)).chunk(2, dim=-1)
        return x_BTH + self.down(F.silu(gate) * up)


class PlainGPT(nn.Module):
    """The 197M model as plain torch code; `loss_of(z, table, labels)` is the head.

    Args:
        dtype: of what autocast does not see, the head and RoPE.
    """

    def __init__(
        self,
        shape: ModelConfig,
        loss_of: Callable[[Tensor, Tensor, Tensor], Tensor],
        rows: int = PADDED_ROWS,
        dtype: torch.dtype = torch.bfloat16,
    ):
        super().__init__()
        self.shape, self.loss_of, self.dtype = shape, loss_of, dtype
        self.table = nn.Embedding(rows, shape.embedding_rank)
        self.projection = nn.Linear(shape.embedding_rank, shape.hidden_size, bias=False)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.num_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, eps=shape.norm_eps)
        for param in self.parameters():
            nn.init.normal_(param, std=shape.init_std) if param.dim() > 1 else nn.init.ones_(param)

    def forward(self, ids_BT: Tensor, labels_BT: Tensor) -> Tensor:
        """Mean loss."""
        tokens = ids_BT.size(1)
        exponents = torch.arange(0, self.shape.head_dim, 2, device=ids_BT.device) / self.shape.head_dim
        angles_TH = torch.outer(torch.arange(tokens, device=ids_BT.device).float(), self.shape.rope_base**-exponents)
        angles_TD = torch.cat((angles_TH, angles_TH), dim=-1)
        cos_TD, sin_TD = angles_TD.cos().to(self.dtype), angles_TD.sin().to(self.dtype)
        x_BTH = self.projection(self.table(ids_BT))
        for block in self.blocks:
            x_BTH = block(x_BTH, cos_TD, sin_TD)
        z_TR = (self.norm(x_BTH).to(self.dtype) @ self.projection.weight.to(self.dtype)).flatten(0, 1)
        return self.loss_of(z_TR, self.table.weight.to(self.dtype), labels_BT.flatten())


def cut_loss(z_TR: Tensor, table_VR: Tensor, labels_T: Tensor) -> Tensor:
    """Apple's cut cross entropy (arXiv:2411.09009)."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(z_TR, table_VR, labels_T)


def chunked_loss(z_TR: Tensor, table_VR: Tensor, labels_T: Tensor) -> Tensor:
    """Logits in chunks of tokens, computed again in backward."""
    total = z_TR.new_zeros((), dtype=torch.float32)
    for z, labels in zip(z_TR.split(CHUNK_TOKENS), labels_T.split(CHUNK_TOKENS), strict=True):
        total = total + checkpoint(_chunk_loss, z, table_VR, labels, use_reentrant=False)
    return total / labels_T.numel()


@torch.compile
def _chunk_loss(z_TR: Tensor, table_VR: Tensor, labels_T: Tensor) -> Tensor:
    return F.cross_entropy((z_TR @ table_VR.t()).float(), labels_T, reduction="sum")


def stepper(model: nn.Module, loss_of_batch: Callable[[Tensor, Tensor], Tensor]) -> Step:
    """The usual loop: autocast, backward over the accumulation, clipping, fused AdamW on FP32 parameters."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(ids_ABT: Tensor, labels_ABT: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device="cuda")
        for ids_BT, labels_BT in zip(ids_ABT, labels_ABT, strict=True):
            with torch.autocast("cuda", torch.bfloat16):
                loss = loss_of_batch(ids_BT, labels_BT) / ids_ABT.size(0)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return total

    return step


def torch_step(shape: ModelConfig, loss_of: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Step:
    """Plain torch layers, each block compiled (all share one compilation)."""
    with torch.device("cuda"):
        model = PlainGPT(shape, loss_of)
    for block in model.blocks:
        block.compile(dynamic=False)
    return stepper(model, model)


def hugging_face_step(shape: ModelConfig) -> Step:
    """transformers' Llama with the folded, tied embedding, each layer compiled."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=PADDED_ROWS, hidden_size=shape.hidden_size, intermediate_size=shape.ffn_hidden_size,
        num_hidden_layers=shape.num_layers, num_attention_heads=shape.num_attention_heads, num_key_value_heads=shape.kv_groups,
        head_dim=shape.head_dim, max_position_embeddings=shape.max_position_embeddings, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    model.train()
    for layer in model.model.layers:
        layer.compile(dynamic=False)

    def loss_of_batch(ids_BT: Tensor, labels_BT: Tensor) -> Tensor:
        logits = model(input_ids=ids_BT).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), labels_BT.flatten())

    return stepper(model, loss_of_batch)


def megatron_step(shape: ModelConfig, precision: str) -> Step:
    """Megatron-core's GPTModel as its own training script builds it: Transformer Engine layers, full embedding, fused loss, optimizer."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.transformer_config import TransformerConfig

    fp8 = {"fp8": "hybrid", "fp8_recipe": "delayed", "fp8_amax_history_len": 16, "fp8_amax_compute_algo": "max"}
    config = TransformerConfig(
        num_layers=shape.num_layers, hidden_size=shape.hidden_size, ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads, num_query_groups=shape.kv_groups, kv_channels=shape.head_dim,
        normalization="RMSNorm", layernorm_epsilon=shape.norm_eps, gated_linear_unit=True, activation_func=F.silu,
        add_bias_linear=False, hidden_dropout=0.0, attention_dropout=0.0, bf16=True, params_dtype=torch.bfloat16,
        bias_activation_fusion=True, bias_dropout_fusion=True, apply_rope_fusion=True, persist_layer_norm=True,
        cross_entropy_loss_fusion=True, gradient_accumulation_fusion=False, **(fp8 if precision == "fp8" else {}),
    )  # fmt: skip
    model = GPTModel(
        config, get_gpt_layer_with_transformer_engine_spec(), vocab_size=PADDED_ROWS, max_sequence_length=shape.max_position_embeddings,
        share_embeddings_and_output_weights=True, position_embedding_type="rope", rotary_base=shape.rope_base,
    ).cuda()  # fmt: skip
    ddp = DistributedDataParallel(
        config, DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True), model
    )
    optim_config = OptimizerConfig(
        optimizer="adam",
        lr=1e-4,
        bf16=True,
        adam_beta2=0.95,
        weight_decay=0.1,
        clip_grad=1.0,
        use_distributed_optimizer=True,
    )
    optimizer = get_megatron_optimizer(optim_config, [ddp])

    def step(ids_ABT: Tensor, labels_ABT: Tensor) -> Tensor:
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        total = torch.zeros((), device="cuda")
        positions = torch.arange(ids_ABT.size(2), device="cuda").expand(ids_ABT.shape[1:])
        for ids_BT, labels_BT in zip(ids_ABT, labels_ABT, strict=True):
            loss = ddp(ids_BT, positions, None, labels=labels_BT).float().mean() / ids_ABT.size(0)
            loss.backward()
            total += loss.detach()
        ddp.finish_grad_sync()
        optimizer.step()
        return total

    return step


def product_step(precision: str, graph: bool, seq_len: int, micro_batch: int, accumulation: int) -> Step:
    """This project's training step."""
    overrides = [f"precision={precision}", f"parallel.cuda_graph={str(graph).lower()}", "parallel.device=cuda"]
    config = parse(compose(["recipe=yxanul_197m_h100", *overrides]))
    model = build_model(config.model, VOCAB_SIZE, config.precision, config.parallel, seed=1, seq_len=seq_len)
    backend = make_backend(model, config, "cuda")
    assert isinstance(backend, CudaBackend)
    backend.prepare(micro_batch, accumulation, seq_len)
    return lambda ids_ABT, labels_ABT: backend.train_step(ids_ABT, labels_ABT, 1e-4, 1.0).loss


def contenders(shape: ModelConfig) -> dict[str, Callable[[int, int, int], Step]]:
    """Name -> what makes its step for (seq_len, windows of a micro-batch, accumulation)."""
    return {
        "product-fp8": lambda *case: product_step("fp8_hybrid", True, *case),
        "product-bf16": lambda *case: product_step("bf16", True, *case),
        "product-fp8-no-graph": lambda *case: product_step("fp8_hybrid", False, *case),
        "torch-cce": lambda *case: torch_step(shape, cut_loss),
        "torch-chunked": lambda *case: torch_step(shape, chunked_loss),
        "hugging-face": lambda *case: hugging_face_step(shape),
        "megatron-fp8": lambda *case: megatron_step(shape, "fp8"),
        "megatron-bf16": lambda *case: megatron_step(shape, "bf16"),
    }


def measure(
    make: Callable[[int, int, int], Step], seq_len: int, micro_batch_tokens: int, tokens_per_step: int
) -> dict[str, Any]:
    """Median of the steps; the micro-batch is halved until it fits."""
    while True:
        release()
        windows, accumulation = micro_batch_tokens // seq_len, tokens_per_step // micro_batch_tokens
        generator = torch.Generator(device="cuda").manual_seed(1)
        shape = (accumulation, windows, seq_len)
        ids, labels = (torch.randint(0, VOCAB_SIZE, shape, device="cuda", generator=generator) for _ in range(2))
        began = time.perf_counter()
        step = warmed_up(make, ids, labels)
        if step is not None:
            break
        micro_batch_tokens //= 2
    setup_seconds = time.perf_counter() - began
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(TIMED_STEPS + 1)]
    marks[0].record()
    for mark in marks[1:]:
        loss = step(ids, labels)
        mark.record()
    torch.cuda.synchronize()
    seconds = statistics.median(a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks))
    return {
        "seq_len": seq_len,
        "micro_batch_tokens": micro_batch_tokens,
        "tokens_per_second": tokens_per_step / seconds,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(),
        "setup_seconds": setup_seconds,
        "loss_nats_per_token": float(loss),
    }


def warmed_up(make: Callable[[int, int, int], Step], ids_ABT: Tensor, labels_ABT: Tensor) -> Step | None:
    """Return the step after its first runs; None where several windows do not fit into memory."""
    accumulation, windows, seq_len = ids_ABT.shape
    try:
        step = make(seq_len, windows, accumulation)
        for _ in range(WARMUP_STEPS):
            step(ids_ABT, labels_ABT)
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        if windows == 1:
            raise
        return None
    return step


def release() -> None:
    """Give back what the contender before held."""
    gc.collect()
    torch.compiler.reset()
    forget_fp8_state()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def main() -> None:
    """Measure all contenders and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-lens", type=int, nargs="+", default=[2048, 128])
    parser.add_argument("--micro-batch-tokens", type=int, default=32_768)
    parser.add_argument("--tokens-per-step", type=int, default=65_536)
    parser.add_argument("--only", nargs="+", help="names of contenders")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    config = parse(compose(["recipe=yxanul_197m_h100", "parallel.device=cuda"]))
    init_process_groups(config.parallel, "cuda", seed=1)
    every = contenders(config.model)
    rows: dict[str, list[dict[str, Any]]] = {}
    report = {"environment": describe_environment(), "gpu": torch.cuda.get_device_name(), "contenders": rows}
    for name in arguments.only or every:
        rows[name] = []
        for seq_len in arguments.seq_lens:
            try:
                rows[name].append(
                    measure(every[name], seq_len, arguments.micro_batch_tokens, arguments.tokens_per_step)
                )
            except Exception as error:  # noqa: BLE001 - a rival that cannot run is a result too
                rows[name].append(
                    {"seq_len": seq_len, "error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
                )
            print(name, rows[name][-1], flush=True)
            if arguments.output:
                write_json_atomic(arguments.output, report)
    table = Table("contender", *(f"tokens/s at {n}" for n in arguments.seq_lens), "micro-batch", "GiB", "setup s")
    for name, cases in rows.items():
        rates = [f"{case['tokens_per_second']:,.0f}" if "error" not in case else "failed" for case in cases]
        first = cases[0]
        rest = ["-"] * 3
        if "error" not in first:
            rest = [
                str(first["micro_batch_tokens"]),
                f"{first['peak_memory_bytes'] / 2**30:.1f}",
                f"{first['setup_seconds']:.0f}",
            ]
        table.add_row(name, *rates, *rest)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
