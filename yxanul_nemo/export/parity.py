"""Proof that an export is the model: logits and greedy text of what was written, loaded anew, against the checkpoint's.

The proof is computed in FP64: two right implementations then differ by about a fifth of what they do in FP32, where rounding
alone reaches the tolerance in 28 layers, so that it shows errors and not rounding. It runs on a GPU where there is one, whose FP64 is
fast on data-centre cards and faster than a CPU's on others. Beside it the difference in FP32, as users
compute, is measured and must stay under the same tolerance, or where the checkpoint's own rounding in FP32 is larger than a
quarter of that, under four times that rounding. (A bound from the export's rounding as well would always hold.)
Where the written weights are BF16, they are compared with the checkpoint's own rounded to BF16 in memory, so that no error hides
in that rounding; what it changes is reported beside it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from yxanul_nemo.config.model import ModelConfig
from yxanul_nemo.config.training import ParallelConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.export.fold import factorized_config, llama_config, to_llama
from yxanul_nemo.export.llama import build_llama, greedy, moved
from yxanul_nemo.model.gpt import YxanulGPT

MAX_DIFFERENCE = 1e-4
"""Largest absolute difference of a logit. What is left in FP64 is the norms of transformers' Llama, which it computes in FP32, and
the fold's rounding to FP32: 1.5e-5 at 28 layers and logits of 6."""
ROUNDINGS = 4
"""How many times the checkpoint's own rounding an export may differ from it in FP32: both round, each in its own order, and the
largest of millions of differences is compared."""
GREEDY_TOKENS = 64
PROMPT_TOKENS = 48
PROOF_BYTES_PER_PARAMETER = 20
"""Of GPU memory: the checkpoint's model in FP32, another in FP64, and both forms of the tensor that is being converted."""
PROOF_BYTES = 4 << 30
"""Of GPU memory beside the models: logits and activations."""

AS_LLAMA = "the model as a Llama"


class ParityError(Exception):
    """An export does not compute what the checkpoint computes; our own failure, never the user's."""


@dataclass(frozen=True)
class Expectation:
    """What an export must compute on fixed prompts and their greedy continuation."""

    ids_BT: Tensor
    """Prompts of PROMPT_TOKENS, each with its GREEDY_TOKENS most likely tokens."""
    logits_BTV: Tensor
    """The checkpoint's, its weights rounded as the export's are."""
    fp32_logits_BTV: Tensor
    """The same computed in FP32."""
    fp32_rounding: float
    """Largest difference between the two: what computing in FP32 does to the checkpoint itself."""
    rounding_difference: float
    """Largest change of a logit by that rounding; 0 in FP32."""


def fixed_prompts(vocab_size: int, eos_id: int) -> Tensor:
    """Prompts [4, PROMPT_TOKENS] that begin with EOS and then visit the vocabulary evenly, the same for every model."""
    ids = torch.arange(4 * PROMPT_TOKENS).mul(vocab_size - 1).div(4 * PROMPT_TOKENS, rounding_mode="floor")
    prompts = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))].view(4, PROMPT_TOKENS).clone()
    prompts[:, 0] = eos_id
    return prompts


def proof_device(parallel: ParallelConfig, parameters: int) -> torch.device:
    """Return where to prove exports of a model of so many parameters, its embedding multiplied out: on the GPU if it has room now."""
    if parallel.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    free_bytes, _ = torch.cuda.mem_get_info()
    fits = free_bytes >= PROOF_BYTES + PROOF_BYTES_PER_PARAMETER * parameters
    return torch.device("cuda", torch.cuda.current_device()) if fits else torch.device("cpu")


@torch.no_grad()
def expect_weights_rounded(model: YxanulGPT, prompts_BT: Tensor, dtype: torch.dtype) -> Expectation:
    """For formats that keep the model's own matrices (`.nemo`, the factorized folder): each rounded to `dtype`."""
    with _rounded(model, dtype):
        # The pair of matrices is less work in each step than their product.
        ids_BT = _with_greedy(_as_llama(model, factorized=True), prompts_BT)
        logits_BTV, fp32_logits_BTV = _logits(model, ids_BT), _own_logits(model, ids_BT)
    return _expectation(model, ids_BT, logits_BTV, fp32_logits_BTV, dtype)


@torch.no_grad()
def expect_folded_then_rounded(model: YxanulGPT, prompts_BT: Tensor, dtype: torch.dtype) -> Expectation:
    """For the standard Llama, whose embedding is multiplied out before it is rounded.

    Raises:
        ParityError: multiplied out, but not yet rounded, it is not the model.
    """
    if dtype == torch.float32:
        return expect_weights_rounded(model, prompts_BT, dtype)
    llama = _as_llama(model)
    _require_close(AS_LLAMA, _logits(llama, prompts_BT), _logits(model, prompts_BT))
    with _rounded(llama, dtype):
        ids_BT = _with_greedy(llama, prompts_BT)
        logits_BTV, fp32_logits_BTV = _logits(llama, ids_BT), _own_logits(llama, ids_BT)
    return _expectation(model, ids_BT, logits_BTV, fp32_logits_BTV, dtype)


@torch.no_grad()
def check_parity(name: str, expected: Expectation, exported: torch.nn.Module) -> dict[str, float | int]:
    """Compare what was written and loaded anew with what is expected of it.

    Returns:
        `max_logit_difference`, in FP64; `fp32_logit_difference`, and beside it `fp32_rounding`, what FP32 does to the checkpoint
        itself; `equal_greedy_tokens`, of GREEDY_TOKENS (fewer only where two tokens are equally likely within the tolerance);
        `rounding_logit_difference`, what the number format of the weights changes.

    Raises:
        ParityError: logits differ by more than is allowed, or the greedy texts differ.
    """
    logits_BTV = _logits(exported, expected.ids_BT)
    difference = _require_close(name, logits_BTV, expected.logits_BTV)
    fp32_limit = max(MAX_DIFFERENCE, ROUNDINGS * expected.fp32_rounding)
    fp32_difference = _require_close(
        f"{name} in FP32", _own_logits(exported, expected.ids_BT), expected.fp32_logits_BTV, fp32_limit
    )
    return {
        "max_logit_difference": difference,
        "fp32_logit_difference": fp32_difference,
        "fp32_rounding": expected.fp32_rounding,
        "equal_greedy_tokens": _require_greedy(name, logits_BTV, expected.ids_BT),
        "rounding_logit_difference": expected.rounding_difference,
    }


def load_nemo(path: Path) -> torch.nn.Module:
    """The `.nemo` file as a user restores it."""
    from yxanul_nemo.model.nemo_model import YxanulModel, quiet_nemo

    with quiet_nemo():
        return YxanulModel.restore_from(str(path), map_location=torch.device("cpu")).eval()


def require_exportable(model: ModelConfig) -> None:
    """Refuse a model that transformers' Llama cannot be, or whose context has no room for the comparison."""
    needed = PROMPT_TOKENS + GREEDY_TOKENS
    if model.max_position_embeddings < needed:
        raise UserError(
            "model.max_position_embeddings", f"is {model.max_position_embeddings}", f"at least {needed} to export"
        )
    if model.hidden_size % model.num_attention_heads:
        # transformers 5 checks this even where head_dim is given.
        raise UserError(
            "model.hidden_size",
            f"{model.hidden_size} is not a multiple of num_attention_heads={model.num_attention_heads}",
            "a multiple, which transformers' Llama insists on",
            "A model of this shape can be trained but not exported.",
        )


def _as_llama(model: YxanulGPT, factorized: bool = False) -> LlamaForCausalLM:
    """The model as transformers' Llama in FP32, on the same device."""
    shape, vocab_size = model.model_shape, model.real_vocab_size
    weights = {
        name: weight.cpu() for name, weight in to_llama(model.state_dict(), shape, vocab_size, factorized).items()
    }
    described = llama_config(shape, vocab_size, eos_id=0, pad_id=None, dtype="float32")
    if factorized:
        described = factorized_config(described, shape.embedding_rank)
    return moved(build_llama(weights, described), _device(model))


def _with_greedy(llama: LlamaForCausalLM, prompts_BT: Tensor) -> Tensor:
    """The prompts and their continuation. It is made in FP32; `_require_greedy` holds it against logits in FP64."""
    prompts_BT = prompts_BT.to(_device(llama))
    return torch.cat([prompts_BT, greedy(llama, prompts_BT, GREEDY_TOKENS)], dim=1)


def _logits(model: torch.nn.Module, ids_BT: Tensor) -> Tensor:
    """Logits [B, T, V] of one of ours or of transformers', computed in FP64 and kept in FP32."""
    with _in_double(model):
        return _own_logits(model, ids_BT)


def _own_logits(model: torch.nn.Module, ids_BT: Tensor) -> Tensor:
    """Logits [B, T, V] computed in the number format of the model's weights: FP32, or FP64 inside `_in_double`."""
    device = _device(model)
    # On a CPU a row at a time, for memory's sake.
    parts = [model(part_BT.to(device)) for part_BT in ids_BT.split(1 if device.type == "cpu" else len(ids_BT))]
    return torch.cat([getattr(part, "logits", part).float() for part in parts])


def _device(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device


def _expectation(
    model: YxanulGPT, ids_BT: Tensor, logits_BTV: Tensor, fp32_logits_BTV: Tensor, dtype: torch.dtype
) -> Expectation:
    if not logits_BTV.isfinite().all():
        raise UserError(
            "checkpoint",
            "gives logits that are not finite",
            "a model that can be used",
            "Training diverged; train again from an earlier checkpoint, with a lower optim.lr.",
        )
    # The continuation was made by transformers' Llama, with a cache; it counts only if it is the checkpoint's own as well.
    _require_greedy(AS_LLAMA, logits_BTV, ids_BT)
    rounding = 0.0 if dtype == torch.float32 else (_logits(model, ids_BT) - logits_BTV).abs().max().item()
    fp32_rounding = (fp32_logits_BTV - logits_BTV).abs().max().item()
    return Expectation(ids_BT, logits_BTV, fp32_logits_BTV, fp32_rounding, rounding)


def _require_close(name: str, logits_BTV: Tensor, expected_BTV: Tensor, limit: float = MAX_DIFFERENCE) -> float:
    if logits_BTV.shape != expected_BTV.shape:
        raise ParityError(f"{name}: logits have the shape {list(logits_BTV.shape)}, not {list(expected_BTV.shape)}")
    difference = (logits_BTV - expected_BTV).abs().max().item()
    # Not "greater than": nothing compares with NaN.
    if not difference <= limit:
        raise ParityError(f"{name}: logits differ by {difference:.3g}, allowed are {limit:.3g}")
    return difference


def _require_greedy(name: str, logits_BTV: Tensor, ids_BT: Tensor) -> int:
    """How many of the greedy tokens in `ids_BT` are the most likely ones for all prompts; the rest must be ties."""
    logits_BTV, chosen_BT = logits_BTV[:, PROMPT_TOKENS - 1 : -1], ids_BT[:, PROMPT_TOKENS:]
    behind_BT = logits_BTV.amax(dim=-1) - logits_BTV.gather(-1, chosen_BT[..., None]).squeeze(-1)
    if not behind_BT.max().item() <= 2 * MAX_DIFFERENCE:
        first = int((~(behind_BT <= 2 * MAX_DIFFERENCE)).any(dim=0).nonzero()[0, 0]) + 1
        raise ParityError(f"{name}: greedy texts differ from token {first} on")
    return int((behind_BT == 0).all(dim=0).sum())


@contextmanager
def _rounded(model: torch.nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """The parameters rounded to `dtype` and back to FP32, for as long as the context lasts."""
    kept = {name: param.detach().clone() for name, param in model.named_parameters()} if dtype != torch.float32 else {}
    try:
        for name, param in model.named_parameters():
            if name in kept:
                param.copy_(param.to(dtype))
        yield
    finally:
        for name, param in model.named_parameters():
            if name in kept:
                param.copy_(kept[name])


@contextmanager
def _in_double(model: torch.nn.Module) -> Iterator[None]:
    """The model in FP64 for as long as the context lasts; FP32 parameters come back as they were."""
    model.double()
    try:
        yield
    finally:
        model.float()
