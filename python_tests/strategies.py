"""Batches that hypothesis draws, and how results are compared."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from literal import IGNORED
from torch import Tensor

# (atol, rtol) of values and gradients; half types are judged against the float64 truth instead.
TOLERANCE = {torch.float64: (1e-10, 1e-8), torch.float32: (1e-6, 1e-5)}
HALF = (torch.bfloat16, torch.float16)


@dataclass
class Batch:
    features: Tensor
    labels: Tensor

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Batch:
        return Batch(self.features.to(device, dtype), self.labels.to(device))


@st.composite
def label_batches(draw: st.DrawFn, max_size: int = 70) -> Tensor:
    """From one class to all single, evenly or Zipf-spread, negative and with gaps, shuffled; at
    times some samples are ignored, or all."""
    size = draw(st.integers(0, max_size))
    classes = draw(st.sampled_from([1, 2, 3, 8, max(1, size)]))
    exponent = draw(st.sampled_from([0.0, 1.0, 2.0]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weights = 1.0 / np.arange(1, classes + 1) ** exponent
    ranks = rng.choice(classes, size, p=weights / weights.sum())
    names = rng.choice(np.array([-(2**62), -7, -1, 0, 1, 2, 1000, 2**62]), 8, replace=False)
    values = np.concatenate([names, np.arange(100, 100 + classes)])[:classes]
    labels = values[ranks].astype(np.int64)
    labels[rng.random(size) < draw(st.sampled_from([0.0, 0.0, 0.3, 1.0]))] = IGNORED
    return torch.from_numpy(labels)


@st.composite
def batches(draw: st.DrawFn, max_size: int = 70, max_dimensions: int = 40) -> Batch:
    labels = draw(label_batches(max_size))
    dimensions = draw(st.integers(1, max_dimensions))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    scale = draw(st.sampled_from([1e-2, 1.0, 30.0]))
    features = torch.randn(len(labels), dimensions, generator=generator, dtype=torch.float64)
    return Batch(scale * features, labels)


@st.composite
def grid_batches(draw: st.DrawFn, max_size: int = 40) -> Batch:
    """Small integers: many equal distances, all computed exactly in every dtype."""
    labels = draw(label_batches(max_size))
    dimensions = draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    features = torch.randint(-2, 3, (len(labels), dimensions), generator=generator)
    return Batch(features.double(), labels)


@st.composite
def exact_batches(draw: st.DrawFn) -> Batch:
    """Small integers in classes of 1, 2, 4 or 8: their means are exact in every dtype as well."""
    sizes = torch.tensor(
        draw(st.lists(st.sampled_from([1, 2, 4, 8]), max_size=8)), dtype=torch.int64
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    labels = torch.repeat_interleave(torch.arange(len(sizes)) - 3, sizes)
    labels = labels[torch.randperm(len(labels), generator=generator)]
    dimensions = draw(st.integers(1, 4))
    features = torch.randint(-2, 3, (len(labels), dimensions), generator=generator)
    return Batch(features.double(), labels)


def strided(x: Tensor, layout: str) -> Tensor:
    """The same values, laid out as a user's slice or transpose would be."""
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "sliced":
        wide = x.new_full((2 * x.shape[0] + 1, x.shape[1] + 3), torch.nan)
        wide[1::2, 2:-1] = x
        return wide[1::2, 2:-1]
    return x.clone()


LAYOUTS = ("contiguous", "transposed", "sliced")


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, scale: float = 1.0) -> None:
    """To the tolerance of `dtype`, absolute for values of the size of `scale`."""
    atol, rtol = TOLERANCE[dtype]
    torch.testing.assert_close(
        actual.cpu().to(dtype), expected.cpu().to(dtype), atol=atol * max(scale, 1.0), rtol=rtol
    )
