"""Checks and times a family's cases; `python -m benchmarks.run` makes a table of it."""

from __future__ import annotations

import functools
import time

import pytest
import torch
from torch import Tensor

from benchmarks.cases import Case, Run, ours_for, ready
from benchmarks.memory import empty_pool

# Cases that take longer are timed in few rounds.
SLOW, FEW = 0.5, 3


def test_case(benchmark, case: Case, family: str, device: str) -> None:
    if case.left_out:
        pytest.skip(case.left_out)
    run = ready(case, device)
    results = run()  # compiles
    if case.checked:
        check(results, expected(ours_for(case, family, device), device))
    del results
    if seconds(run) > SLOW:
        benchmark.pedantic(run, rounds=FEW)
    else:
        run()
        benchmark(run)
    benchmark.extra_info.update(shape=case.shape, form=case.form)
    # What ours keeps for its next step would be missing to the next case.
    empty_pool()


@functools.lru_cache(maxsize=1)
def expected(ours: Case, device: str) -> tuple[Tensor, ...]:
    return ready(ours, device)()


def check(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for result, value in zip(results, expected, strict=True):
        size = value.abs().amax().item()
        torch.testing.assert_close(result, value, atol=1e-4 * size, rtol=1e-2)


def seconds(run: Run) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
