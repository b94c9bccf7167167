"""Range Loss, forward and backward: labels of many kinds, against forms that a user would write."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import range_loss_forms as forms
from benchmarks.cases import Case, Run

DIMENSIONS = 512
ZIPF_CLASSES = 1000


@dataclass(frozen=True)
class Shape:
    """P classes of K samples, or `batch` labels with p_c ~ 1/c over 1,000 classes."""

    name: str
    classes: int = 0
    samples: int = 0
    batch: int = 0
    dimensions: int = DIMENSIONS

    def data(self, device: str) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        if self.batch:
            weights = 1 / torch.arange(1, ZIPF_CLASSES + 1, dtype=torch.float64)
            labels = torch.multinomial(weights, self.batch, replacement=True, generator=generator)
        else:
            labels = torch.arange(self.classes).repeat_interleave(self.samples)
        x = torch.randn(len(labels), self.dimensions, generator=generator)
        return x.to(device).requires_grad_(), labels.to(device)


SHAPES = [
    Shape("one call (2x1, D=1)", 1, 2, dimensions=1),
    Shape("4x8", 4, 8),
    Shape("16x16", 16, 16),
    Shape("64x8", 64, 8),
    Shape("256x8", 256, 8),
    Shape("Zipf B=1024", batch=1024),
    Shape("Zipf B=4096", batch=4096),
]

ANY_LABELS = {
    "ours": forms.ours,
    "torch.compile of ours": torch.compile(forms.ours, fullgraph=True),
    "reference": forms.plain_reference,
    "eager loop": forms.loop,
    "eager dense": forms.dense,
    "torch.compile of eager dense": torch.compile(forms.dense),
}
PK_ONLY = {
    "eager PxK differences": forms.pk_difference,
    "eager PxK Gram": forms.pk_gram,
    "torch.compile of PxK differences": torch.compile(forms.pk_difference),
    "torch.compile of PxK Gram": torch.compile(forms.pk_gram),
}


def forms_of(shape: Shape) -> list[str]:
    if shape.classes == 1:
        return ["ours", "torch.compile of ours"]
    return [*ANY_LABELS, *PK_ONLY] if shape.classes else list(ANY_LABELS)


def forward(shape: Shape, form: str, x: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    if form in PK_ONLY:
        return functools.partial(PK_ONLY[form], x, shape.classes)
    return functools.partial(ANY_LABELS[form], x, labels)


def prepare(shape: Shape, form: str, device: str) -> Run:
    x, labels = shape.data(device)
    loss = forward(shape, form, x, labels)

    def run() -> tuple[Tensor, ...]:
        value = loss()
        return value.detach(), *torch.autograd.grad(value, x)

    return run


def cases(device: str) -> list[Case]:
    return [
        Case(shape.name, form, functools.partial(prepare, shape, form, device))
        for shape in SHAPES
        for form in forms_of(shape)
    ]
