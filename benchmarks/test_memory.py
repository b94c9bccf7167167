"""The measurement of memory, on steps that take a known amount."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.memory import in_own_process, measure_cpu
from facelt_ext import _native

MIB = 1 << 20
LIKE = torch.empty(0)


def nothing() -> tuple[Tensor, ...]:
    return ()


def result_only() -> tuple[Tensor, ...]:
    return (torch.ones(64 * MIB // 4),)


def temporaries_of_104_mib() -> tuple[Tensor, ...]:
    """So large that malloc keeps none of them."""
    first, second = torch.ones(40 * MIB // 4), torch.ones(64 * MIB // 4)
    return (first + second[: len(first)],)


def pooled_of_96_mib() -> tuple[Tensor, ...]:
    """A result and what it is made of from the pool, which keeps the second for the next step."""
    kept = _native.large_output(LIKE, 96 * MIB // 4, torch.float32).fill_(1)
    return (_native.large_output(LIKE, 32 * MIB // 4, torch.float32).copy_(kept[: 32 * MIB // 4]),)


@pytest.mark.parametrize(
    ("run", "expected"),
    [(nothing, 0), (result_only, 0), (temporaries_of_104_mib, 104), (pooled_of_96_mib, 96)],
)
def test_known_amounts(run, expected: int) -> None:
    assert in_own_process(measure_cpu, run) / MIB == pytest.approx(expected, abs=3)
