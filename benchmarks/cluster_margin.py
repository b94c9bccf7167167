"""The cluster margin loss, forward and backward, against forms that a user would write."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import cluster_margin_forms as forms
from benchmarks.cases import Case, Run

FORMS = {
    "ours": forms.ours,
    "torch.compile of ours": torch.compile(forms.ours, fullgraph=True),
    "reference": forms.plain_reference,
    "eager one-hot": forms.one_hot,
    "eager index_add": forms.index_add,
    "eager equal clusters": forms.equal_clusters,
    "torch.compile of one-hot": torch.compile(forms.one_hot),
    "torch.compile of equal clusters": torch.compile(forms.equal_clusters),
}
# The eager forms know nothing of classes with one cluster.
CLUSTERS_PER_CLASS = 4


@dataclass(frozen=True)
class Shape:
    batch: int
    clusters: int
    dimensions: int

    @property
    def name(self) -> str:
        return f"B={self.batch} M={self.clusters} D={self.dimensions}"

    def data(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.batch, self.dimensions, generator=generator)
        x = torch.nn.functional.normalize(x).to(device).requires_grad_()
        index = torch.arange(self.clusters).repeat_interleave(self.batch // self.clusters)
        classes = torch.arange(self.clusters) // CLUSTERS_PER_CLASS
        return x, index.to(device), classes.to(device)


SHAPES = [Shape(240, 12, 512), Shape(240, 12, 64), Shape(4096, 256, 512)]


def prepare(shape: Shape, form: str, device: str) -> Run:
    x, index, classes = shape.data(device)

    def run() -> tuple[Tensor, ...]:
        loss = FORMS[form](x, index, classes)
        return loss.detach(), *torch.autograd.grad(loss, x)

    return run


def cases(device: str) -> list[Case]:
    return [
        Case(shape.name, form, functools.partial(prepare, shape, form, device))
        for shape in SHAPES
        for form in FORMS
    ]
