"""Batches for the margin softmax that hypothesis draws, and how far rounding may move results."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import strategies as st
from strategies import TOLERANCE
from torch import Tensor

from facelt_ext import functional, reference
from facelt_ext.functional import _products
from facelt_ext.reference.margin_softmax import margins_of

# The losses of the papers, as options of the function.
COSFACE = {"scale": 8.0, "cosine_margin": 0.35}
ARCFACE = {"scale": 8.0, "angular_margin": 0.5}
SPHEREFACE = {"scale": 1.0, "angular_multiplier": 4, "normalize_features": False}
PLAIN = {"scale": 1.0, "normalize_features": False, "normalize_weight": False}
MIXED = {
    "scale": 8.0, "cosine_margin": 0.2, "angular_margin": 0.3, "angular_multiplier": 2,
}  # fmt: skip
FLAVOURS = {
    "cosface": COSFACE,
    "arcface": ARCFACE,
    "sphereface": SPHEREFACE,
    "normalized sphereface": {"scale": 8.0, "angular_multiplier": 3},
    "combined": MIXED,
    "combined by norm": {**MIXED, "scale": 1.0, "normalize_features": False},
    "plain": PLAIN,
    "weight as it is": {"scale": 2.0, "normalize_weight": False},
}


@dataclass
class Case:
    features: Tensor
    weight: Tensor
    labels: Tensor
    upstream: Tensor
    options: dict[str, object]

    def to(self, dtype: torch.dtype | None, device: str = "cpu") -> Case:
        """None: every tensor keeps its own dtype."""
        moved = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in self.options.items()
        }
        return replace(
            self,
            features=self.features.to(device, dtype or self.features.dtype),
            weight=self.weight.to(device, dtype or self.weight.dtype),
            labels=self.labels.to(device),
            upstream=self.upstream.to(device, dtype or self.upstream.dtype),
            options=moved,
        )

    def margins(self) -> dict[str, Tensor]:
        """Each sample's own, [B]."""
        classes = torch.where(self.labels == self.ignored, 0, self.labels)
        names = ("cosine_margin", "angular_margin")
        return {n: margins_of(self.options.get(n, 0.0), classes, torch.float64) for n in names}

    @property
    def ignored(self) -> int:
        return self.options.get("ignore_index", -100)


def random_case(
    seed: int, batch: int, classes: int, dimensions: int, spread: float = 1.0, **options: object
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    return Case(
        spread * normal(batch, dimensions),
        normal(classes, dimensions),
        torch.randint(classes, (batch,), generator=generator),
        normal(batch),
        options,
    )


def losses_and_grads(function, case: Case, **options: object) -> list[Tensor]:
    """The losses, and the gradients of their sum weighted with the upstream gradient."""
    x = case.features.detach().clone().requires_grad_()
    w = case.weight.detach().clone().requires_grad_()
    losses = function(x, w, case.labels, reduction="none", **case.options, **options)
    upstream = case.upstream.to(losses.dtype)
    return [losses.detach(), *torch.autograd.grad(losses, (x, w), upstream)]


def truth(case: Case) -> list[Tensor]:
    """The reference in float64, on the same inputs; in float32 it is imprecise itself."""
    return losses_and_grads(reference.margin_softmax_loss, case.to(torch.float64))


def run(place, case: Case, **options: object) -> list[Tensor]:
    with place.run():
        moved = case.to(None, place.device)
        results = losses_and_grads(functional.margin_softmax_loss, moved, **options)
    return [result.cpu() for result in results]


@contextlib.contextmanager
def chunks_of(classes: int | None) -> Iterator[None]:
    """So many classes at a time, where a batch of a test would otherwise be one chunk."""
    with pytest.MonkeyPatch.context() as patch:
        if classes is not None:
            patch.setattr(_products, "MULTIPLE", classes)
            patch.setattr(_products, "CHUNK_BYTES", {"cpu": 1, "cuda": 1})
        yield


@st.composite
def margins(draw: st.DrawFn, classes: int, batch: int, largest: float) -> float | Tensor:
    kind = draw(st.sampled_from(["none", "number", "class", "sample"]))
    if kind == "none":
        return 0.0
    if kind == "number":
        return draw(st.sampled_from([largest / 4, largest]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    shape = (classes,) if kind == "class" else (batch, 1)
    # A few are 0: there the target's logit is taken another way.
    drawn = largest * torch.rand(shape, dtype=torch.float64, generator=generator)
    return torch.where(drawn < largest / 4, 0, drawn)


@st.composite
def cases(draw: st.DrawFn, max_batch: int = 24, max_classes: int = 60, grid: bool = False) -> Case:
    """Random directions, with rows that are parallel or opposite to their class's row, and zeros.

    On the grid, of small integers, parallel rows are so exactly.
    """
    batch = draw(st.integers(0, max_batch))
    classes = draw(st.sampled_from([1, 2, 3, 7, max_classes]))
    dimensions = draw(st.integers(1, 5 if grid else 20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    spread = draw(st.sampled_from([0.1, 1.0, 4.0]))

    def rows(count: int) -> Tensor:
        if grid:
            return torch.randint(-2, 3, (count, dimensions), generator=generator).double()
        return spread * torch.randn(count, dimensions, dtype=torch.float64, generator=generator)

    features, weight = rows(batch), rows(classes)
    labels = torch.randint(classes, (batch,), generator=generator)
    upstream = torch.randn(batch, dtype=torch.float64, generator=generator)
    ignored = draw(st.sampled_from([-100, 0, classes - 1]))
    if batch:
        same = torch.randint(batch, (batch // 4,), generator=generator)
        factors = torch.tensor([2.0, 0.5, -1.0], dtype=torch.float64)
        chosen = torch.randint(3, (len(same), 1), generator=generator)
        features[same] = factors[chosen] * weight[labels[same]]
        labels[torch.rand(batch, generator=generator) < 0.1] = ignored
        if draw(st.booleans()):
            features[draw(st.integers(0, batch - 1))] = 0
    if draw(st.booleans()):
        weight[draw(st.integers(0, classes - 1))] = 0
    options: dict[str, object] = {"ignore_index": ignored}
    options["normalize_weight"] = draw(st.sampled_from([True, True, True, False]))
    options["normalize_features"] = draw(st.booleans())
    if options["normalize_weight"]:
        options["cosine_margin"] = draw(margins(classes, batch, 0.5))
        options["angular_margin"] = draw(margins(classes, batch, 1.5))
        options["angular_multiplier"] = draw(st.integers(1, 4))
    both = options["normalize_weight"] and options["normalize_features"]
    options["scale"] = draw(st.sampled_from([1.0, 30.0, 64.0, 128.0] if both else [0.25, 1.0, 3.0]))
    return Case(features, weight, labels, upstream, options)


def assert_losses_and_grads(
    actual: list[Tensor], expected: list[Tensor], case: Case, dtype: torch.dtype
) -> None:
    """To the tolerance of `dtype`, for values of the size that the terms have.

    A logit is off by roundings of its size L, which exp turns into so many of a probability. The
    target's derivative by its cosine grows like k / sin(theta) where it has an angular margin.
    """
    size, slope = sizes(case)
    x_norms = case.features.norm(dim=1, keepdim=True)
    w_norms = case.weight.norm(dim=1, keepdim=True)
    scale, upstream = case.options.get("scale", 64.0), case.upstream.abs()
    common = scale * upstream * slope * (1 + size / 8)
    w_terms = (
        w_norms.new_tensor(1.0) if case.options.get("normalize_weight", True) else w_norms.max()
    )
    if case.options.get("normalize_features", True):
        x_terms = x_norms.new_tensor(1.0)
        by_x = common[:, None] * w_terms / torch.where(x_norms == 0, 1, x_norms)
    else:
        x_terms = x_norms[:, 0]
        by_x = common[:, None] * w_terms
    by_w = (common * x_terms).sum().expand_as(w_norms)
    if case.options.get("normalize_weight", True):
        by_w = by_w / torch.where(w_norms == 0, 1, w_norms)
    for name, a, e, terms, times in [
        ("losses", actual[0], expected[0], size, 1),
        ("features' gradient", actual[1], expected[1], by_x, 1),
        ("weight's gradient", actual[2], expected[2], by_w, 10 if dtype == torch.float32 else 1),
    ]:
        assert_within(name, a, e, terms, dtype, times)


def assert_within(
    name: str, actual: Tensor, expected: Tensor, terms: Tensor, dtype: torch.dtype, times: int
) -> None:
    """To `times` the tolerance of `dtype`, for what is added up from terms of the given size."""
    atol, rtol = (times * tolerance for tolerance in TOLERANCE[dtype])
    off = (actual.double() - expected.double()).abs()
    allowed = atol * terms.clamp(min=1.0) + rtol * expected.double().abs()
    assert (off <= allowed).all(), f"{name}: off by {(off / allowed).max():.3g} times the allowed"


def sizes(case: Case) -> tuple[Tensor, Tensor]:
    """Of each sample: its logits', and that of its target's derivative by the cosine."""
    scale = case.options.get("scale", 64.0)
    x_norms, w_norms = case.features.norm(dim=1), case.weight.norm(dim=1)
    k = case.options.get("angular_multiplier", 1)
    size = torch.full_like(x_norms, scale * (2 * k - 1 if k > 1 else 1))
    if not case.options.get("normalize_features", True):
        size = size * x_norms
    if not case.options.get("normalize_weight", True):
        size = size * w_norms.max()
    angular = case.margins()["angular_margin"]
    classes = torch.where(case.labels == case.ignored, 0, case.labels)
    u = torch.nn.functional.normalize(case.features)
    v = torch.nn.functional.normalize(case.weight)[classes]
    half_angle = torch.atan2((u - v).norm(dim=1), (u + v).norm(dim=1))
    sine = torch.sin(2 * half_angle).clamp(min=1e-4)
    slope = torch.where(angular > 0, k / sine, float(k * k))
    return size, torch.where(slope < math.inf, slope, 1)


def rms(values: list[Tensor]) -> float:
    return torch.cat([v.double().flatten() for v in values]).square().mean().sqrt().item()


def products_made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of what torch.mm gives, as it gives them."""
    made, mm = [], torch.mm

    def counting(left, right, **options):
        made.append((left.shape[0], right.shape[1]))
        return mm(left, right, **options)

    monkeypatch.setattr(torch, "mm", counting)
    return made
