"""Batches for the dispersion softmax that hypothesis draws, and how they are run and compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import literal_dispersion
import torch
from hypothesis import strategies as st
from softmax_cases import assert_within
from torch import Tensor

from facelt_ext import functional, reference
from facelt_ext.functional.dispersion import dispersion_loss

ALL = (True, True, True)


@dataclass
class Case:
    """upstream: [B], of the losses."""

    features: Tensor
    head: Tensor
    tail: Tensor
    super_class: Tensor
    labels: Tensor
    upstream: Tensor
    ignored: int = -100

    def to(self, dtype: torch.dtype | None, device: str = "cpu") -> Case:
        """None: every tensor keeps its own dtype."""
        floating = ("features", "head", "tail", "upstream")
        moved = {n: getattr(self, n).to(device, dtype or getattr(self, n).dtype) for n in floating}
        integers = {n: getattr(self, n).to(device) for n in ("super_class", "labels")}
        return replace(self, **moved, **integers)

    @property
    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.features, self.head, self.tail

    def index(self) -> functional.SuperClassIndex:
        return functional.SuperClassIndex(self.super_class)


def assignment(tails: int, count: int, generator: torch.Generator) -> Tensor:
    """Super classes of at least one tail each, in any order."""
    others = torch.randint(max(count, 1), (tails - count,), generator=generator)
    index = torch.cat([torch.arange(count), others])
    return index[torch.randperm(tails, generator=generator)]


def random_case(
    seed: int,
    batch: int,
    heads: int,
    tails: int,
    count: int,
    dimensions: int,
    spread: float = 1.0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    return Case(
        spread * normal(batch, dimensions),
        normal(heads, dimensions),
        normal(tails, dimensions),
        assignment(tails, count, generator),
        torch.randint(heads + tails, (batch,), generator=generator),
        normal(batch),
    )


@st.composite
def cases(draw: st.DrawFn, max_batch: int = 20, most: int = 40) -> Case:
    """From no heads or no tails to many, one super class for all tails or one for each, batches
    that meet a tail twice, or several tails of one super class, or are ignored."""
    heads = draw(st.sampled_from([0, 1, 2, 7, most]))
    tails = draw(st.sampled_from([0, 1, 2, 7, most] if heads else [1, 2, 7, most]))
    count = draw(st.sampled_from(sorted({min(tails, 1), -(-tails // 3), tails})))
    case = random_case(
        draw(st.integers(0, 2**32 - 1)), draw(st.integers(0, max_batch)), heads, tails, count,
        draw(st.integers(1, 20)), draw(st.sampled_from([0.1, 1.0, 4.0])),
    )  # fmt: skip
    batch, classes = len(case.labels), heads + tails
    # As an ignored label, a class's number hides that class, and never a super class of its number.
    case.ignored = draw(st.sampled_from([-100, 0, heads, heads + count - 1, classes - 1]))
    kind = draw(st.sampled_from(["any", "few", "tails", "ignored"]))
    if kind == "few":
        case.labels = case.labels[torch.arange(batch) % 3]
    elif kind == "tails" and tails:
        case.labels = heads + case.labels % tails
    elif kind == "ignored":
        case.labels[:] = case.ignored
    case.labels[draw(st.integers(0, 4)) :: 5] = case.ignored
    return case


def losses_and_grads(
    function: Callable[..., Tensor], case: Case, wanted: tuple[bool, ...] = ALL
) -> list[Tensor | None]:
    """function(features, head, tail), and the gradients of their sum weighted with the upstream
    gradient; None for those that are not wanted."""
    inputs = [x.detach().clone().requires_grad_(w) for x, w in zip(case.rows, wanted, strict=True)]
    losses = function(*inputs)
    chosen = [x for x in inputs if x.requires_grad]
    grads = iter(torch.autograd.grad(losses, chosen, case.upstream.to(losses.dtype)))
    return [losses.detach(), *(next(grads) if w else None for w in wanted)]


def truth(case: Case) -> list[Tensor]:
    """The reference in float64, on the same inputs; in float32 it is imprecise itself."""
    wide = case.to(torch.float64)

    def function(*rows: Tensor) -> Tensor:
        return reference.dispersion_softmax_loss(
            *rows, wide.super_class, wide.labels, reduction="none", ignore_index=wide.ignored
        )

    return losses_and_grads(function, wide)


def literal_loss(case: Case) -> list[Tensor]:
    tensors = (*case.rows, case.super_class, case.labels, case.upstream)
    results = literal_dispersion.dispersion_softmax_loss(
        *(t.numpy() for t in tensors), case.ignored
    )
    return [torch.from_numpy(result) for result in results]


def loss_of(
    case: Case, *, joint: bool = False, prepared: bool = True, **options: object
) -> Callable[..., Tensor]:
    """The loss by the rows; joint: heads and tails lie in one weight."""
    super_class = case.index() if prepared else case.super_class
    options = {"reduction": "none", "workspace": "auto", "ignore_index": case.ignored, **options}

    def function(features: Tensor, head: Tensor, tail: Tensor) -> Tensor:
        if not joint:
            return functional.dispersion_softmax_loss(
                features, head, tail, super_class, case.labels, **options
            )
        weight = torch.cat([head, tail])
        return dispersion_loss(features, weight, None, super_class, case.labels, **options)

    return function


def run(
    place, case: Case, *, wanted: tuple[bool, ...] = ALL, **options: object
) -> list[Tensor | None]:
    with place.run():
        moved = case.to(None, place.device)
        results = losses_and_grads(loss_of(moved, **options), moved, wanted)
    return [None if result is None else result.cpu() for result in results]


def assert_losses_and_grads(
    actual: list[Tensor | None], expected: list[Tensor], case: Case, dtype: torch.dtype
) -> None:
    """To the tolerance of `dtype`, for values of the size that the terms have.

    A logit is off by roundings of its size L, which exp turns into so many of a probability.
    """
    x, head, tail = (t.double() for t in case.rows)
    x_norms = x.norm(dim=1)
    row_size = torch.cat([head, tail]).norm(dim=1).max()
    logits = x_norms * row_size
    common = case.upstream.double().abs() * (1 + logits / 8)
    by_x = (common * row_size)[:, None].expand_as(x)
    by_row = (common * x_norms).sum()
    names = ("losses", "features' gradient", "heads' gradient", "tails' gradient")
    terms = (logits, by_x, by_row, by_row)
    for k, (name, a, e, size) in enumerate(zip(names, actual, expected, terms, strict=True)):
        if a is not None:
            assert_within(name, a, e, size, dtype, 10 if k > 1 and dtype == torch.float32 else 1)
