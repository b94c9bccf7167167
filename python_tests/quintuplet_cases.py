"""Batches for the quintuplet loss, and how they are run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import literal_quintuplets
import torch
from hypothesis import assume
from hypothesis import strategies as st
from strategies import label_batches
from torch import Tensor

from facelt_ext import functional

MARGINS = (0.3, -0.2, 0.9)


@dataclass
class Case:
    """upstream: [B], of the anchors' losses."""

    features: Tensor
    labels: Tensor
    clusters: Tensor
    upstream: Tensor
    margins: tuple[float, float, float] = MARGINS

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Case:
        return replace(
            self,
            features=self.features.to(device, dtype),
            labels=self.labels.to(device),
            clusters=self.clusters.to(device),
            upstream=self.upstream.to(device),
        )


def random_case(
    seed: int, batch: int, dimensions: int, classes: int = 3, clusters: int = 3, **options: object
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    return Case(
        torch.randn(batch, dimensions, dtype=torch.float64, generator=generator),
        torch.randint(classes, (batch,), generator=generator) - 1,
        torch.randint(clusters, (batch,), generator=generator) - 1,
        torch.randn(batch, dtype=torch.float64, generator=generator),
        **options,
    )


@st.composite
def cases(draw: st.DrawFn, max_batch: int = 60, grid: bool = False) -> Case:
    """From one class to all single, from one cluster to one for each sample. On a grid many
    distances are equal, and all exact."""
    labels = draw(label_batches(max_batch))
    seed = draw(st.integers(0, 2**32 - 1))
    case = random_case(seed, len(labels), draw(st.integers(1, 4 if grid else 40)))
    case.labels = labels
    kind = draw(st.sampled_from(["one", "few", "own"]))
    if kind == "one":
        case.clusters[:] = 2**62
    elif kind == "own":
        case.clusters = torch.arange(len(labels)) - 3
    if grid:
        case.features = (1.5 * case.features).round()
        case.margins = draw(st.sampled_from([(0.0, 0.0, 0.0), (1.0, 2.0, -3.0), (-2.0, 1.0, 4.0)]))
    return case


def literal_loss(case: Case) -> tuple[Tensor, Tensor, Tensor, list[float]]:
    losses, grad, with_hinge, exceedings = literal_quintuplets.quintuplet_loss(
        case.features.detach().double().numpy(), case.labels.numpy(), case.clusters.numpy(),
        case.margins, case.upstream.numpy(),
    )  # fmt: skip
    return (
        torch.from_numpy(losses),
        torch.from_numpy(grad),
        torch.from_numpy(with_hinge),
        exceedings,
    )


def assume_no_doubt(case: Case) -> None:
    """No hinge is near its edge, and no two distances are near to each other, in float32."""
    x = case.features.double()
    size = float(x.square().sum(1).amax()) if len(x) else 0.0
    assume(all(abs(e) > 1e-4 * max(size, 1.0) for e in literal_loss(case)[3]))
    distances = torch.pdist(x).square().sort().values.tolist() if len(x) > 1 else []
    assume(all(b - a > 1e-6 * b for a, b in pairwise(distances)))


def loss_of(case: Case, reduction: str = "none") -> Callable[[Tensor], Tensor]:
    def function(x: Tensor) -> Tensor:
        return functional.quintuplet_loss(
            x, case.labels, case.clusters, margins=case.margins, reduction=reduction
        )

    return function


def run(place, case: Case) -> list[Tensor]:
    """The losses, and the gradient of their sum weighted with the upstream gradient."""
    with place.run():
        moved = case.to(case.features.dtype, place.device)
        x = moved.features.clone().requires_grad_()
        losses = loss_of(moved)(x)
        (grad,) = torch.autograd.grad(losses, x, moved.upstream.to(losses.dtype))
        return [losses.detach().cpu(), grad.cpu()]
