"""The dispersion softmax, with the gradients of features and both weights."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import dispersion_forms as forms
from benchmarks.cases import Case, Run
from benchmarks.super_classes import assignment
from facelt_ext.functional import SuperClassIndex

FORMS = {
    "ours, high": forms.ours_high,
    "ours, low": forms.ours_low,
    "ours": forms.ours,
    "eager, eqs. 6-8": forms.all_logits,
    "eager, gathered members": forms.gathered_members,
    "torch.compile of eqs. 6-8": torch.compile(forms.all_logits),
}
OTHER_LOSS = {"softmax over all classes": forms.all_classes}
FLOOR = "floor"


@dataclass(frozen=True)
class Shape:
    """The paper's data has N_h = 32,032 heads and N_t = 53,132 tails in S = 7,200 super classes."""

    batch: int
    heads: int = 32_032
    tails: int = 53_132
    super_classes: int = 7_200
    dimensions: int = 512
    backward: bool = True

    @property
    def name(self) -> str:
        name = (
            f"B={self.batch} N_h={self.heads:,} N_t={self.tails:,} S={self.super_classes:,} "
            f"D={self.dimensions}"
        )
        return name if self.backward else name + " forward only"

    def data(self, device: str) -> tuple[Tensor, Tensor, Tensor, SuperClassIndex, Tensor]:
        generator = torch.Generator().manual_seed(0)

        def leaf(rows: int, scale: float) -> Tensor:
            x = torch.randn(rows, self.dimensions, generator=generator).mul_(scale).to(device)
            return x.requires_grad_(self.backward)

        features, head, tail = leaf(self.batch, 1.0), leaf(self.heads, 0.1), leaf(self.tails, 0.1)
        index = SuperClassIndex(assignment(self.tails, self.super_classes, generator))
        labels = torch.randint(self.heads + self.tails, (self.batch,), generator=generator)
        return features, head, tail, index.to(device), labels.to(device)


SHAPES = [
    Shape(256, 3_000, 5_000, 700),
    Shape(256),
    Shape(1024),
    Shape(32),
    Shape(256, dimensions=128),
    Shape(256, backward=False),
]


def forms_of(shape: Shape) -> list[str]:
    left_out = ("ours",) if shape.backward else ("ours, high", "ours, low")
    return [*(form for form in FORMS if form not in left_out), *OTHER_LOSS, FLOOR]


def prepare(shape: Shape, form: str, device: str) -> Run:
    inputs = shape.data(device)
    if form == FLOOR:
        return floor(inputs[0], shape)
    loss = functools.partial({**FORMS, **OTHER_LOSS}[form], *inputs)
    if not shape.backward:
        return functools.partial(forward, loss)

    def run() -> tuple[Tensor, ...]:
        value = loss()
        return value.detach(), *torch.autograd.grad(value, inputs[:3])

    return run


@torch.no_grad()
def forward(loss) -> tuple[Tensor, ...]:
    return (loss(),)


def floor(features: Tensor, shape: Shape) -> Run:
    """The bare products with N_h + S rows that any form needs, into memory that is there before."""
    features = features.detach()
    rows = torch.randn(shape.heads + shape.super_classes, shape.dimensions).to(features.device)
    products = features.new_zeros(len(features), len(rows))
    grad_features, grad_rows = torch.zeros_like(features), torch.zeros_like(rows)

    def run() -> tuple[Tensor, ...]:
        torch.mm(features, rows.t(), out=products)
        if shape.backward:
            torch.mm(products, rows, out=grad_features)
            torch.mm(products.t(), features, out=grad_rows)
        return ()

    return run


def cases(device: str) -> list[Case]:
    return [
        Case(
            shape.name,
            form,
            functools.partial(prepare, shape, form, device),
            checked=form in FORMS,
        )
        for shape in SHAPES
        for form in forms_of(shape)
    ]
