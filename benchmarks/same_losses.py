"""The product beside plain torch: the losses of its first steps and those of an independent model and loop, step by step.

    python -m benchmarks.same_losses [--steps 300] [--plain fp32] [--micro-batch-tokens 8192] [--unscaled-residuals] [--output FILE.json] \
        recipe=... key=value ...

Both begin with the same weights and see the same windows in the same order, with the learning rate and clipping that the product uses at
each step. The other model is `benchmarks.peers.PlainGPT`, trained as one would write it down: autocast to BF16 or not (`--plain`), mean
loss over all tokens, `clip_grad_norm_`, torch's AdamW with decay of matrices alone. In FP32 the losses must agree within rounding for as
long as training amplifies no noise; a difference that is there from the first steps on is an error of one of the two.

The recipe's data must be prepared (`stage=data`), `run.dir` must be new otherwise, and `optim` AdamW. One process, whole windows.
"""

import argparse
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.peers import Block, PlainGPT
from yxanul_nemo.config.load import compose, parse
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.config.training import OptimConfig, PrecisionConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.export.fold import to_llama
from yxanul_nemo.files import write_json_atomic
from yxanul_nemo.model.build import build_model
from yxanul_nemo.training.backend import StepResult
from yxanul_nemo.training.loop import train_phase
from yxanul_nemo.training.prepare import prepare_phase
from yxanul_nemo.training.signals import StopRequest

CHUNK_LOGITS = 1 << 28
"""Logits of a chunk of tokens."""


def plain_loss(z_TR: Tensor, table_VR: Tensor, labels_T: Tensor) -> Tensor:
    """Mean cross entropy from FP32 logits, in chunks whose logits are computed again in the backward pass."""
    tokens = max(1, CHUNK_LOGITS // len(table_VR))
    sums = [
        checkpoint(_sum_of_losses, z, table_VR, labels, use_reentrant=False)
        for z, labels in zip(z_TR.split(tokens), labels_T.split(tokens), strict=True)
    ]
    return torch.stack(sums).sum() / len(labels_T)


def _sum_of_losses(z_TR: Tensor, table_VR: Tensor, labels_T: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(z_TR, table_VR).float(), labels_T, reduction="sum")


def plain_model(
    config: RunConfig, vocab_size: int, dtype: torch.dtype, device: torch.device, unscaled_residuals: bool = False
) -> PlainGPT:
    """`PlainGPT` with the weights that the product begins with, in FP32; those of a product in BF16 are rounded once.

    Args:
        unscaled_residuals: take back what the product's projections into the residual stream are scaled by, 1 / sqrt(2 layers).
    """
    parallel = config.parallel.model_copy(update={"layer_spec": "torch"})
    built = build_model(config.model, vocab_size, PrecisionConfig(name="fp32"), parallel, config.run.seed)
    rounded = torch.float32 if config.precision.name == "fp32" else torch.bfloat16
    state = {name: x.to(rounded).float() for name, x in built.state_dict().items() if isinstance(x, Tensor)}
    weights = to_llama(state, config.model, vocab_size, factorized=True)
    model = PlainGPT(config.model, plain_loss, vocab_size, dtype)
    own = {
        "table.weight": weights["model.embed_tokens.table.weight"],
        "projection.weight": weights["model.embed_tokens.projection.weight"],
        "norm.weight": weights["model.norm.weight"],
    }
    for i in range(config.model.num_layers):
        ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
        own |= {
            f"{ours}attention.qkv.weight": torch.cat([weights[f"{theirs}self_attn.{n}_proj.weight"] for n in "qkv"]),
            f"{ours}attention.out.weight": weights[f"{theirs}self_attn.o_proj.weight"],
            f"{ours}gate_up.weight": torch.cat([weights[f"{theirs}mlp.{n}_proj.weight"] for n in ("gate", "up")]),
            f"{ours}down.weight": weights[f"{theirs}mlp.down_proj.weight"],
            f"{ours}norm1.weight": weights[f"{theirs}input_layernorm.weight"],
            f"{ours}norm2.weight": weights[f"{theirs}post_attention_layernorm.weight"],
        }
    model.load_state_dict(own)
    if unscaled_residuals:
        with torch.no_grad():
            for block in model.blocks:
                assert isinstance(block, Block)
                for linear in (block.attention.out, block.down):
                    linear.weight.mul_(math.sqrt(2 * config.model.num_layers))
    return model.to(device)


class PlainLoop:
    """A training loop in plain torch; `step` is one update."""

    def __init__(self, model: nn.Module, optim: OptimConfig, micro_batch_tokens: int, in_bf16: bool):
        self.model, self.micro_batch_tokens, self.in_bf16 = model, micro_batch_tokens, in_bf16
        matrices, vectors = (
            [p for p in model.parameters() if (p.dim() > 1) == is_matrix] for is_matrix in (True, False)
        )
        groups = [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(optim.beta1, optim.beta2), eps=optim.eps)

    def step(self, ids_ABT: Tensor, labels_ABT: Tensor, lr: float, grad_clip: float) -> tuple[float, float]:
        """(loss, gradient norm before clipping) of a step on windows [..., seq_len]."""
        ids_WT, labels_WT = ids_ABT.flatten(0, -2), labels_ABT.flatten(0, -2)
        windows = max(1, self.micro_batch_tokens // ids_WT.size(1))
        self.optimizer.zero_grad()
        total = 0.0
        for ids_BT, labels_BT in zip(ids_WT.split(windows), labels_WT.split(windows), strict=True):
            with torch.autocast(ids_BT.device.type, torch.bfloat16) if self.in_bf16 else nullcontext():
                loss = self.model(ids_BT, labels_BT) * (len(ids_BT) / len(ids_WT))
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        return float(total), float(norm)


def losses_of_both(
    config: RunConfig,
    steps: int,
    plain: str,
    micro_batch_tokens: int,
    show: Callable[[dict[str, float]], None],
    unscaled_residuals: bool = False,
) -> list[dict[str, float]]:
    """Train the first steps of the recipe's first phase with both; a row for each step: losses, gradient norms, learning rate."""
    if config.data.document_mask or config.optim.muon is not None:
        raise UserError("data.document_mask and optim", "are more than the plain model has", "false and adamw")
    prepared = prepare_phase(config, 1)
    if prepared.checkpoint is not None or dist.get_world_size() > 1:
        raise UserError(config.run.dir, "has a checkpoint already, or there are several processes", "one new run")
    config = prepared.config
    device = next(prepared.backend.model.parameters()).device
    in_bf16 = plain == "bf16"
    dtype = torch.bfloat16 if in_bf16 else torch.float32
    model = plain_model(config, prepared.manifest.vocab_size, dtype, device, unscaled_residuals)
    if device.type == "cuda":
        for block in model.blocks:
            block.compile(dynamic=False)
    loop = PlainLoop(model, config.optim, micro_batch_tokens, in_bf16)
    stop, rows, product_step = StopRequest(), [], prepared.backend.train_step

    def both(ids_ABT: Tensor, labels_ABT: Tensor, lr: float, grad_clip: float, **options: bool) -> StepResult:
        result = product_step(ids_ABT, labels_ABT, lr, grad_clip, **options)
        loss, norm = loop.step(ids_ABT, labels_ABT, lr, grad_clip)
        row = {
            "learning_rate": lr,
            "product_loss": float(result.loss),
            "plain_loss": loss,
            "product_norm": float(result.grad_norm),
            "plain_norm": norm,
        }
        rows.append(row)
        show(row)
        if len(rows) == steps:
            stop.reason = f"{steps} steps"
        return result

    prepared.backend.train_step = both  # type: ignore[method-assign, assignment]  # runs a second model beside it
    train_phase(prepared, stop)
    return rows


def main() -> None:
    """Print a row for each step, and what the differences are in the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument(
        "--plain", choices=("bf16", "fp32"), default="bf16", help="number format of the plain model's products"
    )
    parser.add_argument("--micro-batch-tokens", type=int, default=8192, help="of the plain model")
    parser.add_argument(
        "--unscaled-residuals",
        action="store_true",
        help="begin the plain model with projections into the residual stream as large as other matrices: what that changes",
    )
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument("overrides", nargs="*", help="as for launcher.py")
    arguments = parser.parse_args()
    print(f"{'step':>6}{'lr':>11}{'product':>11}{'plain':>11}{'difference':>12}{'norms':>10}{'':>10}", flush=True)
    count = 0

    def show(row: dict[str, float]) -> None:
        nonlocal count
        count += 1
        product, plain = row["product_loss"], row["plain_loss"]
        print(
            f"{count:>6}{row['learning_rate']:>11.3e}{product:>11.5f}{plain:>11.5f}{product - plain:>+12.6f}"
            f"{row['product_norm']:>10.4f}{row['plain_norm']:>10.4f}",
            flush=True,
        )

    config = parse(compose(arguments.overrides))
    rows = losses_of_both(
        config, arguments.steps, arguments.plain, arguments.micro_batch_tokens, show, arguments.unscaled_residuals
    )
    differences = torch.tensor([row["product_loss"] - row["plain_loss"] for row in rows])
    print(f"largest difference {float(differences.abs().max()):.6f}", end="")
    for last in (10, 100):
        print(f", mean of the last {last} {float(differences[-last:].mean()):+.6f}", end="")
    print(" nats per token")
    if arguments.output:
        write_json_atomic(arguments.output, {"overrides": arguments.overrides, "plain": arguments.plain, "steps": rows})


if __name__ == "__main__":
    main()
