"""The micro-batch for the machine: what a GPU's memory comes to, and what happens where it does not suffice."""

import pytest
import torch

from yxanul_nemo.config.load import compose, parse
from yxanul_nemo.curriculum.phases import plan_phases
from yxanul_nemo.errors import UserError
from yxanul_nemo.machine.gpu_table import BY_KEY
from yxanul_nemo.model.memory import COMFORTABLE_SHARE, MOST_MICRO_BATCH_TOKENS, forecast_memory_bytes, with_micro_batch
from yxanul_nemo.training.micro_batch import fit_batch

GIB = 1 << 30


@pytest.mark.parametrize("gpu", BY_KEY.values(), ids=lambda gpu: gpu.key)
@pytest.mark.parametrize("recipe", ["yxanul_197m_ultra", "yxanul_270m_h100"])
def test_auto_fills_the_memory_of_each_gpu_and_no_more(recipe: str, gpu) -> None:
    config = with_micro_batch(parse(compose([f"recipe={recipe}"])), 200_005, gpu.memory_bytes)
    tokens = config.parallel.micro_batch_tokens
    rows = config.model.padded_vocab_size(200_005)

    def needed(tokens: int) -> float:
        with_muon = config.optim.muon is not None
        return forecast_memory_bytes(config.model, rows, config.precision, config.parallel, tokens, with_muon=with_muon)

    assert needed(tokens) <= COMFORTABLE_SHARE * gpu.memory_bytes
    assert tokens == MOST_MICRO_BATCH_TOKENS or needed(tokens + 1) > COMFORTABLE_SHARE * gpu.memory_bytes


def test_a_number_is_left_as_it_is_and_a_gpu_that_is_too_small_is_refused() -> None:
    asked = parse(compose(["recipe=yxanul_197m_ultra", "parallel.micro_batch_tokens=2048"]))
    assert with_micro_batch(asked, 200_005, 80 * GIB) == asked
    with pytest.raises(UserError, match=r"one window of 2048 tokens is expected to take 4\.. GiB of the GPU's 4\.0"):
        with_micro_batch(parse(compose(["recipe=yxanul_197m_ultra"])), 200_005, 4 * GIB)


class Memory:
    """Room for so many tokens at once."""

    def __init__(self, tokens: int):
        self.tokens, self.tried = tokens, []

    def prepare(self, micro_batch_size: int, accumulation: int, seq_len: int) -> None:
        self.tried.append((micro_batch_size, accumulation))
        if micro_batch_size * seq_len > self.tokens:
            raise torch.OutOfMemoryError


def test_what_does_not_fit_is_halved_and_the_step_stays() -> None:
    (phase, *_) = (p for p in plan_phases(parse(compose(["recipe=yxanul_197m_h100"])).curriculum) if p.seq_len == 2048)
    memory = Memory(tokens=9_000)
    layout = fit_batch(phase, 1, 65_536, 8, memory.prepare, any_rank=lambda flag: flag)
    # 81,920 tokens are 40 windows: 20 x 2, then the largest even splits of at most 10, and of at most 5.
    assert memory.tried == [(20, 2), (10, 4), (5, 8), (2, 20)]
    assert layout.micro_batch_size * 2048 <= 9_000
    assert layout.windows_per_step * 2048 == phase.tokens_per_step


def test_a_rank_without_memory_is_every_rank_s_concern() -> None:
    phase = plan_phases(parse(compose(["recipe=yxanul_197m_h100"])).curriculum)[-1]
    others_short = iter([True, False])
    memory = Memory(tokens=1 << 20)
    layout = fit_batch(phase, 2, 65_536, 8, memory.prepare, any_rank=lambda flag: flag or next(others_short))
    assert memory.tried == [(20, 1), (10, 2)] and layout.accumulation == 2


def test_a_window_that_does_not_fit_is_the_end() -> None:
    phase = plan_phases(parse(compose(["recipe=yxanul_197m_h100"])).curriculum)[-1]
    with pytest.raises(UserError, match="one window of 2048 tokens does not fit"):
        fit_batch(phase, 1, 65_536, 8, Memory(tokens=100).prepare, any_rank=lambda flag: flag)
