"""What is timed: the cases of a family, each a form at a shape.

A family is a module here, `cases(device)` of which lists them, beside a module of its forms.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FAMILIES = (
    "range_loss",
    "margin_softmax",
    "compactness",
    "super_classes",
    "dispersion",
    "cluster_margin",
    "quintuplets",
)
THREADS = 2

# Runs a form once and gives its results, which are not counted as memory that it takes.
Run = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """A form at a shape. The first one of a shape is ours, which the others are compared with.

    Attributes:
        prepare: makes the inputs and gives what is timed.
        checked: whether the results have to be ours.
        left_out: why it is not run, if so.
    """

    shape: str
    form: str
    prepare: Callable[[], Run]
    checked: bool = True
    left_out: str = ""

    @property
    def name(self) -> str:
        return f"{self.shape} | {self.form}"


def cases_of(family: str, device: str, select: str = "") -> list[Case]:
    """The family's cases whose name holds `select`."""
    cases = importlib.import_module(f"benchmarks.{family}").cases(device)
    return [case for case in cases if select in case.name]


def ours_for(case: Case, family: str, device: str) -> Case:
    return next(other for other in cases_of(family, device) if other.shape == case.shape)


def ready(case: Case, device: str) -> Run:
    """The case, prepared, to be run to its end in each call."""
    torch.set_num_threads(THREADS)
    torch.compiler.reset()
    run = case.prepare()
    if device == "cpu":
        return run

    def finished() -> tuple[Tensor, ...]:
        results = run()
        torch.cuda.synchronize()
        return results

    return finished
