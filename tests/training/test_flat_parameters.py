"""Buckets of parameters on gloo ranks: what each of them updates, and sums of gradients."""

import gc
import math
import random
import weakref

import torch
import torch.distributed as dist

from tests.ranks import run_ranks
from yxanul_nemo.training.flat_parameters import ALIGNMENT, FlatParameters, places

SHAPES = ((70, 16), (5,), (33, 48), (300, 8), (129,), (2, 2, 64))


def test_cuts_lie_between_rows() -> None:
    rng = random.Random(0)
    for _ in range(200):
        widths = [rng.choice((1, 8, 48, 64, 96, 768, 2048)) for _ in range(rng.randint(1, 12))]
        shapes = [(rows,) if w == 1 else (rows, w) for w in widths for rows in [rng.randint(1, 3000)]]
        shares = rng.choice((1, 2, 3, 8, 64))
        begins, share = places(shapes, shares)
        ends = [begin + math.prod(shape) for begin, shape in zip(begins, shapes, strict=True)]
        assert all(begin % ALIGNMENT == 0 for begin in begins)
        assert all(end <= begin for end, begin in zip(ends, begins[1:], strict=False)) and ends[-1] <= shares * share
        for begin, end, shape in zip(begins, ends, shapes, strict=True):
            for cut in range(share, shares * share, share):
                assert not begin < cut < end or (cut - begin) % math.prod(shape[1:]) == 0


class ScaledSum(torch.autograd.Function):
    """factor x sum of a parameter, with a gradient that goes straight into the bucket, as fused products add theirs."""

    @staticmethod
    def forward(ctx, param: torch.nn.Parameter, factor: float) -> torch.Tensor:
        ctx.param, ctx.factor = param, factor
        return param.float().sum() * factor

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[None, None]:
        ctx.param.main_grad += ctx.factor * grad
        return None, None


def update(bucket_elements: int, dtype: torch.dtype) -> dict[str, object]:
    """Two micro-batches with gradients that depend on the rank, and an update of each main parameter by its gradient."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    flat = FlatParameters(params, dist.group.WORLD, is_shared=True, bucket_elements=bucket_elements)
    flat.zero_grads()
    for micro_batch in (1, 2):
        factors = [(dist.get_rank() + number) * micro_batch for number in range(len(params))]
        terms = [
            ScaledSum.apply(param, factor) if number % 2 else (param.float() * factor).sum()
            for number, (param, factor) in enumerate(zip(params, factors, strict=True))
        ]
        sum(terms).backward()
    flat.reduce_grads()
    for part in flat.parts:
        part.main.add_(part.grad)
    flat.publish()
    rows = [(params_index(params, part.param), part.first_row, len(part.main)) for part in flat.parts]
    return {"values": [p.detach().float().numpy() for p in params], "rows": rows, "buckets": len(flat.buckets)}


def params_index(params: list[torch.nn.Parameter], param: torch.nn.Parameter) -> int:
    return next(i for i, other in enumerate(params) if other is param)


def cases() -> list[dict[str, object]]:
    return [update(elements, dtype) for elements in (1 << 20, 2000) for dtype in (torch.float32, torch.bfloat16)]


def test_each_rank_updates_rows_of_its_own_and_has_the_whole_model() -> None:
    ranks = 3
    of_ranks = run_ranks(cases, ranks)
    generator = torch.Generator().manual_seed(0)
    before = [torch.randn(shape, generator=generator) for shape in SHAPES]
    for number, results in enumerate(zip(*of_ranks, strict=True)):
        dtype = (torch.float32, torch.bfloat16)[number % 2]
        assert (results[0]["buckets"] > 1) == (number >= 2)
        for i, start in enumerate(before):
            # The gradient of rank r is (i + r) x (1 + 2).
            expected = (start.to(dtype).float() + 3 * sum(i + rank for rank in range(ranks))).to(dtype).float()
            for result in results:
                torch.testing.assert_close(torch.from_numpy(result["values"][i]), expected)
        updated = sorted(rows for result in results for rows in result["rows"])
        for i, shape in enumerate(SHAPES):
            blocks = [(first, count) for param, first, count in updated if param == i]
            assert [first for first, _ in blocks] == [sum(c for _, c in blocks[:k]) for k in range(len(blocks))]
            assert sum(count for _, count in blocks) == shape[0]


STACKED = (5, 3, 7), (4, 8, 16)
"""Numbers and shapes of parameters of two groups: a matrix is no multiple of the alignment, and is one."""


def update_stacks(elements: int) -> dict[str, object]:
    """As `update`, by the stacks, with a parameter of no group in between."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    generator = torch.Generator().manual_seed(0)
    groups = [
        [torch.nn.Parameter(torch.randn(*shape, generator=generator).bfloat16()) for _ in range(count)]
        for count, *shape in STACKED
    ]
    other = torch.nn.Parameter(torch.randn(10, 3, generator=generator).bfloat16())
    params = [*groups[0], other, *groups[1]]
    before = [param.detach().float().numpy() for param in params]
    flat = FlatParameters(params, dist.group.WORLD, is_shared=True, stacked=groups, bucket_elements=elements)
    flat.zero_grads()
    sum((param.float() * (number + dist.get_rank())).sum() for number, param in enumerate(params)).backward()
    flat.reduce_grads()
    for stacks in flat.stacks:
        for stack in stacks:
            stack.mains.add_(stack.grads)
            stack.values.copy_(stack.mains)
            for part, main, grad in zip(stack.parts, stack.mains, stack.grads, strict=True):
                assert torch.equal(part.main, main) and torch.equal(part.grad, grad)
                assert main.shape == part.param.shape and main.data_ptr() == part.main.data_ptr()
    flat.publish(stacks_are_rounded=True)
    owned = [[params_index(params, part.param) for stack in stacks for part in stack.parts] for stacks in flat.stacks]
    return {"before": before, "values": [p.detach().float().numpy() for p in params], "owned": owned}


def stack_cases() -> list[dict[str, object]]:
    return [update_stacks(elements) for elements in (1 << 20, 200)]


def test_stacked_parameters_are_whole_with_one_rank() -> None:
    for ranks in (1, 3):
        for of_ranks in zip(*run_ranks(stack_cases, ranks), strict=True):
            owned = [sorted(i for result in of_ranks for i in result["owned"][group]) for group in (0, 1)]
            assert owned == [[0, 1, 2, 3, 4], [6, 7, 8, 9]]
            most = max(len(result["owned"][0]) for result in of_ranks)
            assert most == math.ceil(STACKED[0][0] / ranks)
            for i, before in enumerate(of_ranks[0]["before"]):
                total = 0 if i == 5 else sum(i + rank for rank in range(ranks))
                expected = (torch.from_numpy(before) + total).bfloat16().float()
                for result in of_ranks:
                    assert torch.equal(torch.from_numpy(result["values"][i]), expected)


def freed() -> list[bool]:
    """Whether parameters and their memory are gone with the last reference to them."""
    dist.init_process_group("gloo")
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    flat = FlatParameters(params, dist.group.WORLD, is_shared=False)
    sum(param.sum() for param in params).backward()
    held = [weakref.ref(x) for x in (flat, flat.buckets[0], flat.buckets[0].grads, params[0])]
    del flat, params
    gc.collect()
    return [reference() is None for reference in held]


def test_nothing_stays_in_memory_when_a_model_is_dropped() -> None:
    """The benchmark and precision=auto make several in one process."""
    assert run_ranks(freed, 1) == [[True] * 4]
