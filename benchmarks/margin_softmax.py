"""Margin softmax (CosFace): the loss, with the gradients of features and weight or alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import margin_softmax_forms as forms
from benchmarks.cases import Case, Run

Loss = Callable[[], Tensor]

METRIC_LEARNING = "pytorch-metric-learning"
FORMS = {
    "ours, high": forms.ours_high,
    "ours, low": forms.ours_low,
    "ours": forms.ours,
    "eager one-hot": forms.one_hot,
    "eager indexed": forms.indexed,
    "torch.compile of one-hot": torch.compile(forms.one_hot),
    METRIC_LEARNING: None,  # its weight is a part of it
}
NO_MARGIN = {
    "linear_cross_entropy, no margin": forms.linear_cross_entropy,
    f"the same in chunks of {forms.CHUNK}": forms.chunked_linear_cross_entropy,
}
FLOOR = "floor"
# On the CPU these take minutes, and 10 GiB and more, where the logits of a batch are so large.
HEAVY = {"eager one-hot", "eager indexed", METRIC_LEARNING, *NO_MARGIN}
HEAVY_FROM = 1 << 30


@dataclass(frozen=True)
class Shape:
    batch: int
    classes: int
    dimensions: int = 512
    backward: bool = True

    @property
    def name(self) -> str:
        name = f"B={self.batch} N={self.classes:,} D={self.dimensions}"
        return name if self.backward else name + " forward only"

    def data(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(self.batch, self.dimensions, generator=generator)
        weight = torch.randn(self.classes, self.dimensions, generator=generator).mul_(0.01)
        labels = torch.randint(self.classes, (self.batch,), generator=generator)
        leaves = (x.to(device).requires_grad_(self.backward) for x in (features, weight))
        return *leaves, labels.to(device)


CLASSES = (1_000, 10_572, 85_164, 500_000)
SHAPES = [
    *(Shape(batch, classes) for classes in CLASSES for batch in (256, 1024)),
    Shape(32, 85_164),
    Shape(256, 85_164, 128),
    *(Shape(256, classes, backward=False) for classes in CLASSES[:-1]),
]


def forms_of(shape: Shape) -> list[str]:
    ours = ("ours, high", "ours, low") if shape.backward else ("ours",)
    peers = [form for form in FORMS if not form.startswith("ours")]
    return [*ours, *peers, *NO_MARGIN, FLOOR]


def prepare(shape: Shape, form: str, device: str) -> Run:
    features, weight, labels = shape.data(device)
    if form == FLOOR:
        return floor(features, weight, shape.backward)
    if form == METRIC_LEARNING:
        module = forms.metric_learning(weight).requires_grad_(shape.backward)
        return steps(functools.partial(module, features, labels), features, module.W, True)
    loss = functools.partial({**FORMS, **NO_MARGIN}[form], features, weight, labels)
    return steps(loss, features, weight, False)


def steps(loss: Loss, features: Tensor, weight: Tensor, transposed: bool) -> Run:
    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (loss(),)

    def forward_and_backward() -> tuple[Tensor, ...]:
        value = loss()
        grad_features, grad_weight = torch.autograd.grad(value, (features, weight))
        return value.detach(), grad_features, grad_weight.t() if transposed else grad_weight

    return forward_and_backward if features.requires_grad else forward


def floor(features: Tensor, weight: Tensor, backward: bool) -> Run:
    """The bare products that any form needs, into memory that is there before."""
    features, weight = features.detach(), weight.detach()
    products = features.new_zeros(len(features), len(weight))
    grad_features, grad_weight = torch.zeros_like(features), torch.zeros_like(weight)

    def run() -> tuple[Tensor, ...]:
        torch.mm(features, weight.t(), out=products)
        if backward:
            torch.mm(products, weight, out=grad_features)
            torch.mm(products.t(), features, out=grad_weight)
        return ()

    return run


def cases(device: str) -> list[Case]:
    return [
        Case(
            shape.name,
            form,
            functools.partial(prepare, shape, form, device),
            checked=form in FORMS,
            left_out=left_out(shape, form, device),
        )
        for shape in SHAPES
        for form in forms_of(shape)
    ]


def left_out(shape: Shape, form: str, device: str) -> str:
    logits = 4 * shape.batch * shape.classes
    if device == "cpu" and form in HEAVY and logits >= HEAVY_FROM:
        return f"left out: logits of {logits / 2**30:.1f} GiB"
    return ""
