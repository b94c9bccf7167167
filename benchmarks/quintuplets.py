"""The quintuplet loss, forward and backward, against forms that a user would write."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import quintuplets_forms as forms
from benchmarks.cases import Case, Run

FORMS = {
    "ours": forms.ours,
    "torch.compile of ours": torch.compile(forms.ours, fullgraph=True),
    "eager Gram": forms.gram,
    "eager cdist": forms.cdist,
    "eager, mined first": forms.mined_first,
    "torch.compile of Gram": torch.compile(forms.gram),
    "torch.compile of mined first": torch.compile(forms.mined_first),
}
CLUSTER_SIZE, CLUSTERS_PER_CLASS = 16, 4


@dataclass(frozen=True)
class Shape:
    batch: int
    dimensions: int = 512

    @property
    def name(self) -> str:
        return f"B={self.batch} D={self.dimensions}"

    def data(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.batch, self.dimensions, generator=generator)
        clusters = torch.arange(self.batch) // CLUSTER_SIZE
        x = torch.nn.functional.normalize(x).to(device).requires_grad_()
        return x, (clusters // CLUSTERS_PER_CLASS).to(device), clusters.to(device)


SHAPES = [Shape(256), Shape(2048), Shape(2048, 64)]


def prepare(shape: Shape, form: str, device: str) -> Run:
    x, labels, clusters = shape.data(device)

    def run() -> tuple[Tensor, ...]:
        loss = FORMS[form](x, labels, clusters)
        return loss.detach(), *torch.autograd.grad(loss, x)

    return run


def cases(device: str) -> list[Case]:
    return [
        Case(shape.name, form, functools.partial(prepare, shape, form, device))
        for shape in SHAPES
        for form in FORMS
    ]
