"""`conf/bench`: what `stage=bench` measures."""

from pydantic import Field

from yxanul_nemo.config.base import Section
from yxanul_nemo.config.training import NumberFormat


class BenchConfig(Section):
    """Cases of the benchmark. It changes nothing in the run; lists are tried in every combination."""

    seq_len: list[int] | None = Field(default=None, min_length=1)
    """Window lengths in tokens; unset: each phase of the curriculum with its own `tokens_per_step`."""
    precision: list[NumberFormat] | None = Field(default=None, min_length=1)
    """Number formats; unset: the recipe's, which for `precision=auto` are all that it chooses from."""
    micro_batch_tokens: list[int] | None = Field(default=None, min_length=1)
    """Largest micro-batches in tokens; unset: the recipe's."""
    tokens_per_step: int | None = Field(default=None, ge=1)
    """Tokens of one optimizer step where `seq_len` is set; unset: two micro-batches for each data-parallel rank."""
    steps: int = Field(default=20, ge=2)
    """Steps that are timed for each case."""
    warmup_steps: int = Field(default=4, ge=1)
    """Steps before them, in which kernels are compiled and the CUDA graph is captured."""
    profile: bool = False
    """Also list the GPU's kernels by their share of a step."""
