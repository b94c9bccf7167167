"""Batches of samples in clusters that hypothesis draws, and how they are run and compared."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import literal_cluster_margin
import numpy as np
import torch
from hypothesis import assume
from hypothesis import strategies as st
from literal import IGNORED
from softmax_cases import assert_within
from torch import Tensor

from facelt_ext import functional, reference
from facelt_ext.functional import cluster_margin

MARGINS = {"between_margin": 0.4, "within_margin": 0.1}
# Below this a hinge may be on either side of 0 by rounding.
GAP = 1e-4


@dataclass
class Case:
    """upstream: [B], of the losses."""

    features: Tensor
    cluster_index: Tensor
    cluster_class: Tensor
    upstream: Tensor
    sample_weight: Tensor | None = None
    options: dict[str, float | bool] = field(default_factory=lambda: dict(MARGINS))

    def to(self, dtype: torch.dtype | None, device: str = "cpu") -> Case:
        """None: every tensor keeps its own dtype."""
        moved = {
            name: tensor.to(device, dtype or tensor.dtype)
            for name in ("features", "upstream", "sample_weight")
            if (tensor := getattr(self, name)) is not None
        }
        integers = {n: getattr(self, n).to(device) for n in ("cluster_index", "cluster_class")}
        return replace(self, **moved, **integers)

    @property
    def normalize(self) -> bool:
        return bool(self.options.get("normalize_centroids", False))

    def counts(self) -> Tensor:
        kept = self.cluster_index[self.taking_part]
        return torch.bincount(kept, minlength=len(self.cluster_class))

    @property
    def taking_part(self) -> Tensor:
        return self.cluster_index != IGNORED


def random_case(
    seed: int, batch: int, clusters: int, dimensions: int, classes: int = 3, **options: object
) -> Case:
    """Features of length 1 around their clusters' centres."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    index = torch.randint(clusters, (batch,), generator=generator)
    features = normal(clusters, dimensions)[index] + normal(batch, dimensions)
    return Case(
        torch.nn.functional.normalize(features),
        index,
        torch.randint(classes, (clusters,), generator=generator) - 1,
        normal(batch),
        options={**MARGINS, **options},
    )


@st.composite
def cases(draw: st.DrawFn, max_batch: int = 40, most: int = 40) -> Case:
    """From one cluster to more than have samples; from one class to one for each; clusters of many
    samples and of one; now and then some samples are ignored, or all."""
    batch = draw(st.integers(0, max_batch))
    clusters = draw(st.sampled_from([1, 2, 3, 5, 12, 33, 40]).map(lambda m: min(m, most)))
    case = random_case(
        draw(st.integers(0, 2**32 - 1)), batch, clusters, draw(st.integers(1, 21)),
        between_margin=draw(st.sampled_from([-0.7, 0.4, 2.1])),
        within_margin=draw(st.sampled_from([-1.3, 0.1, 1.6])),
        normalize_centroids=draw(st.booleans()),
    )  # fmt: skip
    names = draw(st.sampled_from(["one", "own", "few"]))
    if names == "one":
        case.cluster_class[:] = -7
    elif names == "own":
        case.cluster_class[:] = torch.arange(clusters).flip(0)
    else:
        case.cluster_class = torch.tensor([-(2**62), 2**62, 0])[case.cluster_class]
    spread = draw(st.sampled_from(["any", "few", "single"]))
    if spread == "few":
        case.cluster_index = clusters - 1 - case.cluster_index % -(-clusters // 3)
    elif spread == "single":
        case.cluster_index = torch.arange(batch).flip(0) % clusters
    ignored = draw(st.sampled_from([0.0, 0.0, 0.3, 1.0]))
    generator = torch.Generator().manual_seed(clusters)
    case.cluster_index[torch.rand(batch, generator=generator) < ignored] = IGNORED
    if draw(st.booleans()):
        generator = torch.Generator().manual_seed(batch)
        case.features *= 4 * torch.rand(batch, 1, dtype=torch.float64, generator=generator)
    if draw(st.booleans()):
        case.sample_weight = 0.5 + case.upstream.abs()
    return case


def means_of(case: Case) -> Tensor:
    x, index = case.features[case.taking_part].double(), case.cluster_index[case.taking_part]
    sums = x.new_zeros(len(case.cluster_class), x.shape[1]).index_add(0, index, x)
    return sums / case.counts().clamp(min=1)[:, None]


def assume_no_doubt(case: Case) -> None:
    """No hinge is near its edge, and no mean that is to be divided by its norm is made of what
    cancels, but for those that are exactly 0."""
    exceedings = literal_loss(case)[2]
    size = float(case.features.double().square().sum(1).max()) if len(case.features) else 1.0
    assume(all(abs(e) > GAP * max(size, 1.0) for e in exceedings))
    if case.normalize:
        largest = case.features.double().norm(dim=1).amax() if len(case.features) else 0.0
        norms = means_of(case).norm(dim=1)
        assume(((norms == 0) | (norms > 0.05 * largest)).all())


def losses_and_grad(function: Callable[[Tensor], Tensor], case: Case) -> list[Tensor]:
    """function(features), and the gradient of its sum weighted with the upstream gradient."""
    x = case.features.detach().clone().requires_grad_()
    losses = function(x)
    (grad,) = torch.autograd.grad(losses, x, case.upstream.to(losses.dtype))
    return [losses.detach(), grad]


def truth(case: Case) -> list[Tensor]:
    """The reference in float64, on the same inputs."""
    wide = case.to(torch.float64)

    def function(x: Tensor) -> Tensor:
        return reference.cluster_margin_loss(
            x, wide.cluster_index, wide.cluster_class, sample_weight=wide.sample_weight,
            reduction="none", **wide.options,
        )  # fmt: skip

    return losses_and_grad(function, wide)


def literal_loss(case: Case) -> tuple[Tensor, Tensor, list[float]]:
    weight = 1.0 if case.sample_weight is None else case.sample_weight.double().numpy()
    losses, grad, exceedings = literal_cluster_margin.cluster_margin_loss(
        case.features.double().numpy(), case.cluster_index.numpy(), case.cluster_class.numpy(),
        case.options["between_margin"], case.options["within_margin"], case.normalize,
        np.asarray(weight * case.upstream.double().numpy()),
    )  # fmt: skip
    return torch.from_numpy(weight * losses), torch.from_numpy(grad), exceedings


def loss_of(case: Case, **options: object) -> Callable[[Tensor], Tensor]:
    def function(x: Tensor) -> Tensor:
        return functional.cluster_margin_loss(
            x, case.cluster_index, case.cluster_class,
            **{"sample_weight": case.sample_weight, "reduction": "none", **case.options, **options},
        )  # fmt: skip

    return function


def run(place, case: Case, **options: object) -> list[Tensor]:
    with place.run():
        moved = case.to(None, place.device)
        return [result.cpu() for result in losses_and_grad(loss_of(moved, **options), moved)]


@contextlib.contextmanager
def torch_products_beyond(clusters: int | None) -> Iterator[None]:
    """None: beyond as many as the constant says."""
    before = cluster_margin.FEW_CLUSTERS
    cluster_margin.FEW_CLUSTERS = before if clusters is None else clusters
    try:
        yield
    finally:
        cluster_margin.FEW_CLUSTERS = before


def assert_losses_and_grad(
    actual: list[Tensor], expected: list[Tensor], case: Case, dtype: torch.dtype
) -> None:
    """To the tolerance of `dtype`, for values of the size that the terms have.

    A similarity is off by roundings of its size, which exp turns into so many of its share.
    """
    norms = case.features.double().norm(dim=1)
    largest = norms.amax() if len(norms) else norms.new_zeros(())
    means = means_of(case).norm(dim=1)
    steepness = torch.ones_like(means)
    if case.normalize:
        steepness = torch.where(means > 0, 1 / means.clamp(min=1e-300), 0)
    # What a sample's rounding is to its centroid.
    blur = (steepness * largest).clamp(min=1).amax() if case.normalize else 1.0
    centroid = torch.ones_like(largest) if case.normalize else largest
    similarity = norms * centroid * blur
    factor = torch.ones_like(norms) if case.sample_weight is None else case.sample_weight.double()
    common = factor * case.upstream.double().abs() * (1 + similarity)
    counts = case.counts().clamp(min=1)
    shared = (
        2 * (common * norms).sum() * (steepness * blur / counts)[case.cluster_index.clamp(min=0)]
    )
    assert_within("losses", actual[0], expected[0], factor * (1 + 2 * similarity), dtype, 1)
    by_x = (2 * common * centroid * blur + shared)[:, None].expand_as(case.features)
    assert_within("gradient", actual[1], expected[1], by_x, dtype, 1)
