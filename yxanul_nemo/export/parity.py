"""Proof that an export is the model: logits and greedy text of what was written, loaded anew, against the checkpoint's."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from yxanul_nemo.errors import UserError

MAX_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 0.25}
"""Largest absolute difference of a logit. BF16 weights carry 8 bits: rounding them moves logits of size 10 by about 0.1."""
GREEDY_TOKENS = 64
PROMPT_TOKENS = 48

Logits = Callable[[Tensor], Tensor]


class ParityError(Exception):
    """An export does not compute what the checkpoint computes; our own failure, never the user's."""


def fixed_prompts(vocab_size: int, eos_id: int) -> Tensor:
    """Prompts [4, PROMPT_TOKENS] that begin with EOS and then visit the vocabulary evenly, the same for every model."""
    ids = torch.arange(4 * PROMPT_TOKENS).mul(vocab_size - 1).div(4 * PROMPT_TOKENS, rounding_mode="floor")
    prompts = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))].view(4, PROMPT_TOKENS).clone()
    prompts[:, 0] = eos_id
    return prompts


def check_parity(name: str, reference: Logits, exported: Logits, prompts: Tensor, dtype: torch.dtype) -> dict[str, float | int]:
    """Compare two functions ids [B, T] -> logits [B, T, V]; raises ParityError if they differ by more than `dtype` explains.

    In FP32 the greedy continuation of each prompt must be the same too.
    """
    with torch.no_grad():
        difference = (reference(prompts) - exported(prompts)).abs().max().item()
    if not difference <= MAX_DIFFERENCE[dtype]:
        raise ParityError(f"{name}: logits differ by {difference:.3g}, allowed are {MAX_DIFFERENCE[dtype]:g}")
    result: dict[str, float | int] = {"max_logit_difference": difference}
    if dtype == torch.float32:
        ours, theirs = greedy(reference, prompts, GREEDY_TOKENS), greedy(exported, prompts, GREEDY_TOKENS)
        if not torch.equal(ours, theirs):
            raise ParityError(f"{name}: greedy continuations differ")
        result["equal_greedy_tokens"] = GREEDY_TOKENS
    return result


def greedy(logits: Logits, prompts: Tensor, new_tokens: int) -> Tensor:
    """The most likely continuation [B, new_tokens], one token at a time without a cache."""
    ids = prompts
    with torch.no_grad():
        for _ in range(new_tokens):
            ids = torch.cat([ids, logits(ids)[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
    return ids[:, prompts.size(1) :]


def hf_logits(folder: Path) -> Logits:
    """The folder as a user loads it, computing in FP32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    return lambda ids: model(ids).logits


def nemo_logits(path: Path) -> Logits:
    """The file as a user restores it, computing in FP32."""
    from yxanul_nemo.model import YxanulModel

    model = YxanulModel.restore_from(str(path), map_location=torch.device("cpu")).float().eval()
    return lambda ids: model(ids)


def require_context(max_position_embeddings: int) -> None:
    """The comparison needs room for prompt and continuation."""
    if max_position_embeddings < PROMPT_TOKENS + GREEDY_TOKENS:
        raise UserError(
            "model.max_position_embeddings", f"is {max_position_embeddings}", f"at least {PROMPT_TOKENS + GREEDY_TOKENS} to export"
        )
