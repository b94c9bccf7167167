"""The softmax over classes whose rows are multiplied chunk by chunk: products by torch, our kernels
between them. Margin softmax and dispersion softmax are made of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from facelt_ext import _native
from facelt_ext._autocast import autocast_off
from facelt_ext.functional._products import Chunks
from facelt_ext.types import compute_dtype


class Options(NamedTuple):
    """As csrc/margin.h has them."""

    scale: float
    angular_multiplier: int
    normalize_features: bool
    normalize_weight: bool
    class_offset: int
    num_classes: int
    ignore_index: int


class ChunkedSoftmax:
    """One call's classes and samples.

    Args:
        operand: [B, D], what the chunks' rows are multiplied with, in their dtype.
        chunks: the classes, `class_offset` before the first of them.
        labels: [B]; the logit of each sample's own class is not that of the products but
            targets[0], and its derivative targets[1].
        options: of csrc/margin.h.
        backend: of the kernels.
    """

    def __init__(
        self, operand: Tensor, chunks: Chunks, labels: Tensor, options: Options, backend: str
    ) -> None:
        self.operand, self.chunks, self.labels = operand, chunks, labels
        self.options, self.backend = options, backend
        self.batch = operand.shape[0]

    def run(self, function: str, *args: object) -> None:
        _native.run(self.backend, self.operand, function, *args)

    def empty(self, *shape: int) -> Tensor:
        return self.operand.new_empty(shape, dtype=compute_dtype(self.operand.dtype))

    def _scratch(self) -> Tensor:
        return self.operand.new_empty(self.batch * min(self.chunks.size, len(self.chunks)))

    def log_normalizers(self, targets: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
        """log of the sum of exp(logit) over the classes, [B], and the products if they are kept."""
        if keep:
            count = self.batch * len(self.chunks)
            products = _native.large_output(self.operand, count, self.operand.dtype)
        else:
            products = self._scratch()
        normalizer = self.empty(2, self.batch)
        with autocast_off(self.operand.device.type):
            for first, rows, scales in self.chunks:
                chunk = chunk_of(products, first if keep else 0, self.batch, rows.shape[0])
                torch.mm(self.operand, rows.t(), out=chunk)
                self.run(
                    "margin_softmax_normalizer", chunk, scales, self.labels, targets,
                    self.options.class_offset + first, self.options.scale, first == 0, normalizer,
                )  # fmt: skip
        lse = normalizer[0] + normalizer[1].log()
        return lse, products if keep else products.new_empty(0)

    def coefficients(
        self, grad_losses: Tensor, targets: Tensor, inverse_feature_norms: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Factors of the samples [B], of the weight's gradient [1], of the features' [B].

        A coefficient of 0 says that a sample takes no part: what it holds may be NaN.
        """
        outputs = self.empty(self.batch), self.empty(1), self.empty(self.batch)
        self.run(
            "margin_softmax_coefficients", grad_losses.contiguous(), self.labels, targets,
            inverse_feature_norms, self.options, *outputs,
        )  # fmt: skip
        return outputs

    def gradients(
        self,
        targets: Tensor,
        lse: Tensor,
        coefficients: Tensor,
        products: Tensor,
        raw_features: Tensor | None,
        write: Callable[[int, Tensor, Tensor], None] | None,
    ) -> None:
        """The gradient by each chunk's products [B, C], times the operand's and the rows' side.

        Adds its product with the rows to raw_features [B, D], and hands it to write(first, gradient
        [B, C], scales).
        """
        scratch = self._scratch()
        with autocast_off(self.operand.device.type):
            for first, rows, scales in self.chunks:
                gradient = chunk_of(scratch, 0, self.batch, rows.shape[0])
                if products.shape[0]:
                    chunk = chunk_of(products, first, self.batch, rows.shape[0])
                else:
                    chunk = torch.mm(self.operand, rows.t(), out=gradient)
                self.run(
                    "margin_softmax_gradient", chunk, scales, self.labels, targets, lse,
                    coefficients, self.options.class_offset + first, self.options.scale, gradient,
                )  # fmt: skip
                if raw_features is not None:
                    add_product(raw_features, gradient, rows)
                if write is not None:
                    write(first, gradient, scales)


def taking_part(operand: Tensor, coefficients: Tensor) -> Tensor:
    """What takes no part may hold anything, and 0 * NaN would spread."""
    return torch.where(coefficients[:, None] == 0, 0, operand)


def times_gain(raw: Tensor, gain: Tensor) -> Tensor:
    """The features' gradient [B, D] from what the chunks added up, for gains [B]; 0 stays 0."""
    return torch.where(gain[:, None] == 0, 0, gain[:, None] * raw)


def chunk_of(products: Tensor, first: int, batch: int, columns: int) -> Tensor:
    """The products [B, C] of the classes from `first` on; chunks lie one after another."""
    return products[first * batch : (first + columns) * batch].view(batch, columns)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += torch.mm(left, right)
