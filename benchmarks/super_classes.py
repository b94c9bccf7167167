"""The mean rows of super classes and their gradient: bound by memory."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import super_classes_forms as forms
from benchmarks.cases import Case, Run
from facelt_ext.functional import SuperClassIndex

FORMS = {
    "ours": forms.ours,
    "eager index_add": forms.index_add,
    "eager scatter_reduce": forms.scatter_reduce,
    "eager segment_reduce": forms.segment_reduce,
    "torch.compile of index_add": torch.compile(forms.index_add),
}
FLOOR = "floor"


@dataclass(frozen=True)
class Shape:
    tails: int
    super_classes: int
    dimensions: int = 512
    backward: bool = True

    @property
    def name(self) -> str:
        name = f"{self.tails:,}x{self.dimensions} in {self.super_classes:,}"
        return name if self.backward else name + " forward only"

    def data(self, device: str) -> tuple[Tensor, SuperClassIndex]:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(self.tails, self.dimensions, generator=generator).to(device)
        index = assignment(self.tails, self.super_classes, generator)
        return weight.requires_grad_(self.backward), SuperClassIndex(index).to(device)


def assignment(tails: int, super_classes: int, generator: torch.Generator) -> Tensor:
    """Every super class has a member; the others are drawn evenly."""
    rest = torch.randint(super_classes, (tails - super_classes,), generator=generator)
    index = torch.cat([torch.arange(super_classes), rest])
    return index[torch.randperm(tails, generator=generator)]


SHAPES = [
    Shape(5_000, 700),
    Shape(53_132, 7_200),
    Shape(53_132, 7_200, backward=False),
    Shape(53_132, 7_200, 128),
]
LARGE = Shape(1_000_000, 140_000)


def prepare(shape: Shape, form: str, device: str) -> Run:
    weight, index = shape.data(device)
    if form == FLOOR:
        return floor(weight, index.num_super_classes)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(index.num_super_classes, shape.dimensions, generator=generator)
    upstream = upstream.to(device)

    def run() -> tuple[Tensor, ...]:
        means = FORMS[form](weight, index)
        if not shape.backward:
            return (means,)
        return means.detach(), *torch.autograd.grad(means, weight, upstream)

    return run


def floor(weight: Tensor, super_classes: int) -> Run:
    """Reading the table once and, for the backward, writing it once, into memory that is there."""
    backward, weight = weight.requires_grad, weight.detach()
    grad = torch.zeros_like(weight) if backward else None

    def run() -> tuple[Tensor, ...]:
        weight.sum()
        if grad is not None:
            grad.fill_(1 / super_classes)
        return ()

    return run


def cases(device: str) -> list[Case]:
    return [
        Case(shape.name, form, functools.partial(prepare, shape, form, device), form != FLOOR)
        for shape in (SHAPES if device == "cpu" else [*SHAPES, LARGE])
        for form in (*FORMS, FLOOR)
    ]
