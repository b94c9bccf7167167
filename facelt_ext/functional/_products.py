"""Matrix products between rows that are normalised on the way, in chunks of classes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from facelt_ext import _native
from facelt_ext.types import compute_dtype

# Bytes of a chunk's products, and of its rows of the weight. On the CPU both stay in its caches; on
# a GPU a chunk is large beside what launching its kernels costs.
CHUNK_BYTES = {"cpu": 1 << 21, "cuda": 1 << 27}
ROW_BYTES = {"cpu": 4 << 20, "cuda": 1 << 26}
# What `workspace="auto"` lets the products of a batch take, in bytes.
KEPT_BYTES = {"cpu": 256 << 20, "cuda": 512 << 20}
# What a caller may choose to keep of the products.
WORKSPACES = ("low", "high", "auto")
# Chunks begin where vector loads are aligned.
MULTIPLE = 64
HALF = (torch.bfloat16, torch.float16)


def product_dtype(
    features: torch.dtype, weight: torch.dtype, device: str, name: str = "weight"
) -> torch.dtype:
    """What the products are in: autocast's type, or the features', to which float32 rows adapt."""
    if torch.is_autocast_enabled(device) and torch.float64 not in (features, weight):
        return torch.get_autocast_dtype(device)
    if weight == features or (features in HALF and weight == torch.float32):
        return features
    wanted = f"{features}" + (" or torch.float32" if features in HALF else "")
    raise TypeError(f"{name}: expected dtype {wanted}, as the features, got {weight}")


def product_flops(batch: int, rows: int, dimensions: int) -> int:
    """Of a product of [B, D] with [D, N]."""
    return 2 * batch * rows * dimensions


def convertible(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in a type that the kernels turn into `dtype`, which is all but the other half type."""
    return x if x.dtype in (dtype, torch.float32) else x.to(torch.float32)


def chunk_size(batch: int, dimensions: int, dtype: torch.dtype, device: str) -> int:
    """Classes in a chunk; it depends on nothing that may change between forward and backward."""
    kind = "cuda" if device == "cuda" else "cpu"
    size = min(
        CHUNK_BYTES[kind] // (max(batch, 1) * dtype.itemsize),
        ROW_BYTES[kind] // (dimensions * dtype.itemsize),
    )
    # Adding to a gradient by the features takes B * D a chunk: not more than its products.
    return -(-max(size, dimensions) // MULTIPLE) * MULTIPLE


def keeps_products(workspace: str, features: Tensor, classes: int, dtype: torch.dtype) -> bool:
    """Whether the backward gets all products, or computes them again."""
    if workspace != "auto":
        return workspace == "high"
    budget = KEPT_BYTES.get(features.device.type, 0)
    return features.shape[0] * classes * dtype.itemsize <= budget


def normalized_rows(x: Tensor, dtype: torch.dtype, backend: str) -> tuple[Tensor, Tensor]:
    """x / |x| in `dtype` and 1 / |x| in the compute dtype."""
    rows = torch.empty(x.shape, dtype=dtype, device=x.device)
    inverse_norms = x.new_empty(x.shape[0], dtype=compute_dtype(dtype))
    _native.run(backend, x, "normalize_rows", x, inverse_norms, rows)
    return rows, inverse_norms


def operand_of(
    features: Tensor, normalize: bool, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor]:
    """What the weight's rows are multiplied with, [B, D], and 1 / |feature| [B]."""
    if normalize:
        return normalized_rows(features, dtype, backend)
    inverse_norms = features.new_empty(features.shape[0], dtype=compute_dtype(dtype))
    nothing = features.new_empty(0)
    _native.run(backend, features, "normalize_rows", features, inverse_norms, nothing)
    return features.to(dtype), inverse_norms


class Chunks(Protocol):
    """The rows of classes, chunk after chunk, as products take them."""

    size: int  # of the largest chunk

    def __len__(self) -> int:
        """All classes."""

    def __iter__(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The first class, rows [C, D] in the products' dtype, and scales [C] or none."""


class JoinedChunks:
    """The chunks of one after those of the other, as if all classes were in one weight."""

    def __init__(self, *parts: Chunks) -> None:
        self.parts = parts
        self.size = max(part.size for part in parts)

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def __iter__(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        offset = 0
        for part in self.parts:
            for first, rows, scales in part:
                yield offset + first, rows, scales
            offset += len(part)


class WeightChunks:
    """A weight's rows, chunk after chunk, as products take them.

    Rows in the products' dtype are taken as they are, and `scales` then holds what their products
    are to be multiplied with; others are normalised while they are converted.
    """

    def __init__(
        self,
        weight: Tensor,
        normalize: bool,
        dtype: torch.dtype,
        size: int,
        backend: str,
        inverse_norms: Tensor | None = None,
    ) -> None:
        self.weight, self.normalize, self.dtype, self.size = weight, normalize, dtype, size
        self.backend = backend
        compute = compute_dtype(dtype)
        self._known = inverse_norms is not None
        if inverse_norms is None:
            inverse_norms = weight.new_empty(weight.shape[0] if normalize else 0, dtype=compute)
        self.inverse_norms = inverse_norms
        self._nothing = weight.new_empty(0, dtype=dtype)
        self._no_scales = weight.new_empty(0, dtype=compute)
        converted = min(size, weight.shape[0]) if weight.dtype != dtype else 0
        self._rows = weight.new_empty(converted, weight.shape[1], dtype=dtype)

    def __len__(self) -> int:
        return self.weight.shape[0]

    def __iter__(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        for first in range(0, self.weight.shape[0], self.size):
            chunk = self.weight[first : first + self.size]
            yield first, *self._prepared(chunk, self.inverse_norms[first : first + self.size])
        self._known = True

    def products(self, operand: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The first class, operand @ rows.t() [B, C] (until the next chunk), scales [C] or none."""
        batch = operand.shape[0]
        scratch = operand.new_empty(batch * min(self.size, self.weight.shape[0]))
        for first, rows, scales in self:
            chunk = scratch[: batch * rows.shape[0]].view(batch, rows.shape[0])
            yield first, torch.mm(operand, rows.t(), out=chunk), scales

    def _prepared(self, chunk: Tensor, inverse_norms: Tensor) -> tuple[Tensor, Tensor]:
        if chunk.dtype == self.dtype:
            if self.normalize and not self._known:
                _native.run(
                    self.backend, chunk, "normalize_rows", chunk, inverse_norms, self._nothing
                )
            return chunk, inverse_norms if self.normalize else self._no_scales
        rows = self._rows[: chunk.shape[0]]
        if self.normalize and self._known:
            inverse_norms = torch.empty_like(inverse_norms)
        if self.normalize:
            _native.run(self.backend, chunk, "normalize_rows", chunk, inverse_norms, rows)
        else:
            rows.copy_(chunk)
        return rows, self._no_scales
