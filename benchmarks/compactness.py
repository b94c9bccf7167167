"""The domain frequency indicator of a batch's classes among all of them; it has no gradient."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import compactness_forms as forms
from benchmarks.cases import Case, Run

FORMS = {
    "ours": forms.ours,
    "eager top-k": forms.top_k,
    "torch.compile of top-k": torch.compile(forms.top_k),
}
FLOOR = "floor"


@dataclass(frozen=True)
class Shape:
    classes: int
    k: int = 100
    batch: int = 256
    dimensions: int = 512

    @property
    def name(self) -> str:
        return f"{self.batch} of N={self.classes:,} D={self.dimensions} k={self.k}"

    def data(self, device: str) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(self.classes, self.dimensions, generator=generator).mul_(0.01)
        index = torch.randperm(self.classes, generator=generator)[: self.batch]
        return weight.to(device), index.to(device)


SHAPES = [Shape(10_572), Shape(85_742), Shape(500_000), Shape(85_742, k=1000)]


def prepare(shape: Shape, form: str, device: str) -> Run:
    weight, index = shape.data(device)
    if form == FLOOR:
        return floor(weight, index)
    return lambda: (FORMS[form](weight, index, shape.k),)


def floor(weight: Tensor, index: Tensor) -> Run:
    """The bare product, into memory that is there before."""
    rows, cosines = weight[index], weight.new_zeros(len(index), len(weight))

    def run() -> tuple[Tensor, ...]:
        torch.mm(rows, weight.t(), out=cosines)
        return ()

    return run


def cases(device: str) -> list[Case]:
    return [
        Case(shape.name, form, functools.partial(prepare, shape, form, device), form != FLOOR)
        for shape in SHAPES
        for form in (*FORMS, FLOOR)
    ]
