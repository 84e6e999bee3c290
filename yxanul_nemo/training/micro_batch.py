"""The micro-batch for the machine: tried by a real forward and backward, and halved where memory does not suffice."""

import gc
from collections.abc import Callable

import torch

from yxanul_nemo.curriculum.phases import Phase, batch_layout
from yxanul_nemo.data.windows import BatchLayout
from yxanul_nemo.errors import UserError
from yxanul_nemo.log import logger


def gpu_memory_bytes(device: str) -> int | None:
    """All memory of this process's GPU; None on a CPU."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory if device == "cuda" else None


def fit_batch(
    phase: Phase,
    data_parallel: int,
    max_micro_batch_tokens: int,
    token_multiple: int,
    prepare: Callable[[int, int, int], None],
    any_rank: Callable[[bool], bool],
) -> BatchLayout:
    """The largest even split of a step that `prepare(micro_batch_size, accumulation, seq_len)` gets through on all ranks.

    Running out of memory halves the micro-batch, and the accumulation grows: `tokens_per_step` stays what the recipe promises.

    Args:
        max_micro_batch_tokens: largest micro-batch of a rank, to begin with.
        any_rank: whether a flag is set on any rank.

    Raises:
        UserError: not one window fits, or a step cannot be split.
    """
    while True:
        size, accumulation = batch_layout(phase, data_parallel, max_micro_batch_tokens, token_multiple)
        is_short = False
        try:
            prepare(size, accumulation, phase.seq_len)
        except torch.OutOfMemoryError:
            # Left before anything else happens: the error's traceback holds the tensors that were too many.
            is_short = True
        if not any_rank(is_short):
            return BatchLayout(size, accumulation, data_parallel)
        gc.collect()
        torch.cuda.empty_cache()
        if size == 1:
            raise UserError(
                f"phase {phase.number}",
                f"one window of {phase.seq_len} tokens does not fit into the GPU's memory",
                "a smaller model, or more tensor-parallel ranks",
            )
        max_micro_batch_tokens = size * phase.seq_len // 2
        logger.warning(
            "phase %d: out of memory with micro-batches of %d x %d tokens, trying half of it",
            phase.number,
            size,
            phase.seq_len,
        )
