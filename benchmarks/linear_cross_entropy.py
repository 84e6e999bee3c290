"""Time and accuracy of the linear cross entropy on one GPU, with the peers that are installed.

    python -m benchmarks.linear_cross_entropy --tokens 32768 --rows 200064 --inner 128 --logits flat wide zipf
    python -m benchmarks.linear_cross_entropy --run runs/NAME     # also with a trained model's head, on its own training text

Each variant runs forward and backward on bfloat16 inputs with a mean loss, as in training. Times are medians in
milliseconds from CUDA events with a cold L2 cache; errors are norms of the difference to the float64 chunked path,
relative to its norms. `--json` also writes the figures to a file.
"""

import argparse
import importlib.metadata
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import triton
from torch import Tensor
from triton.testing import do_bench

from yxanul_nemo.kernels.linear_cross_entropy import linear_cross_entropy

if TYPE_CHECKING:
    from yxanul_nemo.model.gpt import YxanulGPT

HeadInputs = tuple[Tensor, Tensor, Tensor]
"""z[T, R], table E[V, R] and labels[T]."""
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Loss of each token, from the head's inputs."""


def make_inputs(kind: str, tokens: int, rows: int, inner: int, vocab_size: int) -> HeadInputs:
    """Inputs of a head whose logits are nearly flat, random with deviation 4, or like a trained model's.

    The last kind adds to random logits of deviation 2 the logarithm of a Zipf distribution over the vocabulary, held by
    one component that all tokens share, and draws its labels from that distribution.
    """
    generator = torch.Generator("cuda").manual_seed(0)
    deviation = {"flat": 0.1, "wide": 4.0, "zipf": 2.0}[kind]
    z_TR = torch.randn(tokens, inner, device="cuda", generator=generator)
    e_VR = torch.randn(rows, inner, device="cuda", generator=generator) * (deviation / inner**0.5)
    labels_T = torch.randint(vocab_size, (tokens,), device="cuda", generator=generator)
    if kind == "zipf":
        log_frequency_V = -torch.arange(1, rows + 1, device="cuda").log()
        z_TR[:, 0], e_VR[:, 0] = 4.0, log_frequency_V / 4.0
        frequency_V = log_frequency_V[:vocab_size].exp()
        labels_T = torch.multinomial(frequency_V, tokens, replacement=True, generator=generator)
    return z_TR.bfloat16().requires_grad_(), e_VR.bfloat16().requires_grad_(), labels_T


def trained_inputs(run_dir: Path, tokens: int) -> tuple[HeadInputs, int]:
    """What the head of a run's newest checkpoint gets from the first windows of its corpus, and the vocabulary's size."""
    # Megatron-core and its like take long to import and are not needed for made inputs.
    from data_prep.corpus.manifest import load_manifest
    from yxanul_nemo.checkpoint.restore import restore_model
    from yxanul_nemo.checkpoint.store import CheckpointStore
    from yxanul_nemo.config.load import load_run_config
    from yxanul_nemo.config.training import PrecisionConfig
    from yxanul_nemo.data.windows import PhaseWindows, Reading, corpus_shards, open_sources
    from yxanul_nemo.machine.runtime import init_process_groups

    config = load_run_config(run_dir / "config.yaml")
    manifest = load_manifest(config.data_dir)
    init_process_groups(config.parallel, "cuda", config.run.seed)
    checkpoint = CheckpointStore.of_run(config).newest_good()
    assert checkpoint is not None, f"{run_dir} holds no checkpoint"
    model = restore_model(config, checkpoint, manifest.vocab_size, PrecisionConfig(name="bf16"), config.parallel)
    seq_len, data = config.validation.eval_len, config.data
    sources = open_sources(corpus_shards(config, manifest), data.seed, max(data.chunk_tokens, seq_len))[:1]
    reading = Reading(0, tokens // seq_len, np.ones(1))
    windows = PhaseWindows(sources, [0], seq_len, [reading], data.shuffle_tokens)
    ids, labels = windows.read(0, tokens // seq_len)

    ids_BT, labels_BT = (torch.from_numpy(x).cuda() for x in (ids, labels))
    return head_inputs(model, ids_BT, labels_BT), manifest.vocab_size


def head_inputs(model: "YxanulGPT", ids_BT: Tensor, labels_BT: Tensor) -> HeadInputs:
    """What the head of a model gets for these windows: z[T, R] of all tokens, its table E[V, R], and labels[T]."""
    from megatron.core.models.gpt.gpt_model import GPTModel

    def inputs(*, hidden_states: Tensor, output_weight: Tensor, **_: object) -> tuple[Tensor, Tensor]:
        return model.embedding.projection.down(hidden_states), output_weight

    with torch.no_grad():
        z_TBR, e_VR = GPTModel.forward(model, ids_BT, None, None, labels=labels_BT, output_processor=inputs)
    z_TR = z_TBR.transpose(0, 1).reshape(-1, z_TBR.size(-1)).contiguous()
    return z_TR.detach().requires_grad_(), e_VR.detach().clone().requires_grad_(), labels_BT.reshape(-1)


def variants(vocab_size: int) -> dict[str, Loss]:
    """Loss of each token by name; peers only where their package is installed."""
    found: dict[str, Loss] = {
        "triton": lambda z, e, y: linear_cross_entropy(z, e, y, vocab_size=vocab_size, impl="triton"),
        "torch": lambda z, e, y: linear_cross_entropy(z, e, y, vocab_size=vocab_size, impl="torch"),
    }
    try:
        from cut_cross_entropy import linear_cross_entropy as cut
    except ImportError:
        return found
    return {**found, "cut-cross-entropy": lambda z, e, y: cut(z, e[:vocab_size], y, reduction="none")}


def measure(loss_of: Loss, inputs: HeadInputs, expected: list[Tensor], repeat_ms: int) -> dict[str, float]:
    """Times, peak memory above the inputs and errors of one variant."""
    z_TR, e_VR, _ = inputs
    g_T = torch.full((z_TR.shape[0],), 1 / z_TR.shape[0], device=z_TR.device)

    def step() -> tuple[Tensor, ...]:
        loss_T = loss_of(*inputs)
        return loss_T, *torch.autograd.grad(loss_T, (z_TR, e_VR), g_T.to(loss_T.dtype))

    def loss_only() -> Tensor:
        with torch.no_grad():
            return loss_of(*inputs)

    def median_ms(function: Callable[[], object]) -> float:
        return do_bench(function, warmup=repeat_ms // 4, rep=repeat_ms, return_mode="median")

    found = step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before_bytes = torch.cuda.memory_allocated()
    step()
    peak_bytes = torch.cuda.max_memory_allocated() - before_bytes
    errors = [((x.double() - wanted).norm() / wanted.norm()).item() for x, wanted in zip(found, expected, strict=True)]
    loss_T = loss_of(*inputs)
    return {
        "loss_only_ms": median_ms(loss_only),
        "forward_ms": median_ms(lambda: loss_of(*inputs)),
        "backward_ms": median_ms(
            lambda: torch.autograd.grad(loss_T, (z_TR, e_VR), g_T.to(loss_T.dtype), retain_graph=True)
        ),
        "both_ms": median_ms(step),
        "peak_MiB": peak_bytes / 2**20,
        **dict(zip(("loss_error", "dz_error", "de_error"), errors, strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--rows", type=int, default=200_064, help="rows of the padded table")
    parser.add_argument("--vocab-size", type=int, help="rows that are no padding (default: all)")
    parser.add_argument("--inner", type=int, default=128)
    parser.add_argument("--logits", choices=("flat", "wide", "zipf"), nargs="*", default=["flat", "wide", "zipf"])
    parser.add_argument("--run", type=Path, help="folder of a trained run")
    parser.add_argument("--repeat-ms", type=int, default=200, help="time spent on each median")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    vocab_size = arguments.vocab_size or arguments.rows

    square = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    matmul_ms = do_bench(lambda: square @ square, rep=arguments.repeat_ms, return_mode="median")
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "tokens": arguments.tokens,
        "rows": arguments.rows,
        "vocab_size": vocab_size,
        "inner": arguments.inner,
        "matmul_8192_tflops": 2 * 8192**3 / matmul_ms / 1e9,
        "results": [],
    }
    print({key: value for key, value in report.items() if key != "results"})
    made: dict[str, tuple[Callable[[], HeadInputs], int]] = {
        kind: (partial(make_inputs, kind, arguments.tokens, arguments.rows, arguments.inner, vocab_size), vocab_size)
        for kind in arguments.logits
    }
    if arguments.run:
        trained, trained_vocab_size = trained_inputs(arguments.run, arguments.tokens)
        made["trained"] = (lambda: trained, trained_vocab_size)
    for kind, (inputs_of, vocab_size) in made.items():
        inputs = inputs_of()
        doubles = [x.detach().double().requires_grad_() for x in inputs[:2]]
        z_TR, e_VR = doubles
        loss_T = linear_cross_entropy(z_TR, e_VR, inputs[2], vocab_size=vocab_size, impl="torch")
        expected = [loss_T.detach(), *torch.autograd.grad(loss_T.mean(), doubles)]
        for name, loss_of in variants(vocab_size).items():
            result = measure(loss_of, inputs, expected, arguments.repeat_ms)
            if name == "cut-cross-entropy":
                report["versions"][name] = importlib.metadata.version(name)
            report["results"].append({"logits": kind, "variant": name, **result})
            figures = "  ".join(f"{key} {value:.3g}" for key, value in result.items())
            print(f"{kind:7} {name:18} {figures}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
