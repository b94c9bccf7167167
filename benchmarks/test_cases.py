"""Checks and times a family's cases; `python -m benchmarks.run` makes a table of it."""

from __future__ import annotations

import functools
import time

import pytest
import torch
from torch import Tensor

from benchmarks.cases import Case, Run, ours_for, ready
from benchmarks.memory import empty_pool

WARM_UP_RUNS, WARM_UP_SECONDS = 3, 1.0


@pytest.mark.benchmark(min_rounds=3)
def test_case(benchmark, case: Case, family: str, device: str) -> None:
    if case.left_out:
        pytest.skip(case.left_out)
    run = ready(case, device)
    if case.checked:
        check(run(), expected(ours_for(case, family, device), device))
    warm_up(run)
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


def warm_up(run: Run) -> None:
    """Compiles, and fills caches."""
    end = time.perf_counter() + WARM_UP_SECONDS
    for _ in range(WARM_UP_RUNS):
        run()
        if time.perf_counter() > end:
            break
