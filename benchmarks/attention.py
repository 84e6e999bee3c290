"""Time and accuracy of attention over whole windows on one Hopper GPU: the project's tiles beside cuDNN's through Transformer Engine.

    python -m benchmarks.attention [--seq-lens 256 512 1024 2048] [--tokens 65536] [--output FILE]

One layer of the 197M model in BF16, forward, and forward with backward, in a CUDA graph as in training; medians in microseconds. Errors are
norms of the difference to attention in FP64 on the first windows, relative to its norms: output, gradients of queries, keys and values.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from triton.testing import do_bench_cudagraph

from yxanul_nemo.files import write_json_atomic
from yxanul_nemo.kernels.causal_attention import causal_attention
from yxanul_nemo.machine.environment import describe_environment

HEADS, GROUPS, HEAD_DIM = 12, 2, 64
EXACT_WINDOWS = 4
"""Windows that are compared with FP64."""
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def cudnn_attention() -> Attention:
    """Transformer Engine's, as Megatron-core calls it, without FlashAttention where that is installed."""
    os.environ["NVTE_FLASH_ATTN"] = "0"
    from transformer_engine.pytorch import DotProductAttention

    options = {"num_gqa_groups": GROUPS, "attention_dropout": 0.0, "attn_mask_type": "causal", "qkv_format": "sbhd"}
    return DotProductAttention(HEADS, HEAD_DIM, **options)


def exact_attention(query: Tensor, key: Tensor, value: Tensor, starts_BT: Tensor | None = None) -> Tensor:
    """torch's on repeated keys and values [T, B, heads, D] -> [T, B, heads x D], from the first token that each token sees on."""
    place_T = torch.arange(query.size(0), device=query.device)
    visible = place_T <= place_T[:, None]
    if starts_BT is not None:
        visible = visible & (place_T >= starts_BT[:, None, :, None])
    repeats = query.size(2) // key.size(2)
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=visible).permute(2, 0, 1, 3).flatten(2)


def results(attention: Attention, given: list[Tensor], dout: Tensor) -> list[Tensor]:
    """Output and gradients."""
    out = attention(*given)
    return [out.detach(), *torch.autograd.grad(out, given, dout)]


def relative_errors(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Norms of the differences over norms of what is expected."""
    return [((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)]


def measure(attention: Attention, seq_len: int, tokens: int) -> dict[str, Any]:
    """Microseconds and errors at one length."""
    generator = torch.Generator("cuda").manual_seed(seq_len)
    windows = tokens // seq_len
    given = [
        torch.randn(
            seq_len, windows, n, HEAD_DIM, device="cuda", dtype=torch.bfloat16, generator=generator
        ).requires_grad_()
        for n in (HEADS, GROUPS, GROUPS)
    ]
    dout = torch.randn(seq_len, windows, HEADS * HEAD_DIM, device="cuda", dtype=torch.bfloat16, generator=generator)
    first = [x.detach()[:, :EXACT_WINDOWS].double().requires_grad_() for x in given]
    expected = results(exact_attention, first, dout[:, :EXACT_WINDOWS].double())
    found = [x[:, :EXACT_WINDOWS].double() for x in results(attention, given, dout)]
    errors = relative_errors(found, expected)
    forward = do_bench_cudagraph(lambda: attention(*given), return_mode="median") * 1e3
    both = do_bench_cudagraph(lambda: results(attention, given, dout), return_mode="median") * 1e3
    return {"forward_microseconds": forward, "both_microseconds": both, "relative_errors": errors}


def main() -> None:
    """Measure both at each length and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-lens", type=int, nargs="+", default=[256, 512, 1024, 2048], help="multiples of 64")
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    rows = []
    table = Table("seq_len", "attention", "forward, us", "both, us", "errors: out, dq, dk, dv")
    for seq_len in arguments.seq_lens:
        for name, attention in (("cuDNN", cudnn_attention()), ("tiles", causal_attention)):
            row = measure(attention, seq_len, arguments.tokens)
            rows.append({"seq_len": seq_len, "attention": name} | row)
            errors = ", ".join(f"{error:.1e}" for error in row["relative_errors"])
            times = [f"{row[key]:,.0f}" for key in ("forward_microseconds", "both_microseconds")]
            table.add_row(str(seq_len), name, *times, errors)
    if arguments.output:
        write_json_atomic(arguments.output, {"environment": describe_environment(), "cases": rows})
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
