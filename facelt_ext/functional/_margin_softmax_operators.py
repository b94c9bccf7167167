"""The operators of the margin softmax: matrix products by torch, our kernels between them.

The weight may be a shard, whose first row is class `class_offset` out of `num_classes`: then the
forward's lse is the shard's, the target of a sample whose class lies elsewhere is 0, and the
backward takes the lse over all shards.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from facelt_ext import _native
from facelt_ext._operators import operator
from facelt_ext.functional._products import (
    WeightChunks,
    autocast_off,
    chunk_size,
    normalized_rows,
)
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


SCHEMA = (
    "float scale, SymInt angular_multiplier, bool normalize_features, bool normalize_weight,"
    " SymInt class_offset, SymInt num_classes, SymInt ignore_index"
)


class Head:
    """What forward and backward of one call have in common."""

    def __init__(
        self,
        features: Tensor,
        weight: Tensor,
        labels: Tensor,
        options: Options,
        dtype: torch.dtype,
        backend: str,
        inverse_norms: Tensor | None = None,
    ) -> None:
        self.features, self.weight = features.contiguous(), weight.contiguous()
        self.labels = labels.contiguous()
        self.options, self.dtype, self.backend = options, dtype, backend
        self.batch, self.dimensions = features.shape
        self.compute = compute_dtype(dtype)
        self.size = chunk_size(self.batch, self.dimensions, dtype, features.device.type)
        self.chunks = WeightChunks(
            self.weight, options.normalize_weight, dtype, self.size, backend, inverse_norms
        )
        self.operand, self.inverse_feature_norms = self._operand()

    def run(self, function: str, *args: object) -> None:
        _native.run(self.backend, self.features, function, *args)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.features.new_empty(shape, dtype=dtype or self.compute)

    def _operand(self) -> tuple[Tensor, Tensor]:
        """What the weight's rows are multiplied with, [B, D], and 1 / |feature| [B]."""
        if self.options.normalize_features:
            return normalized_rows(self.features, self.dtype, self.backend)
        inverse_norms = self.empty(self.batch)
        nothing = self.features.new_empty(0)
        self.run("normalize_rows", self.features, inverse_norms, nothing)
        return self.features.to(self.dtype), inverse_norms


def chunk_of(products: Tensor, first: int, batch: int, columns: int) -> Tensor:
    """The products [B, C] of the classes from `first` on; chunks lie one after another."""
    return products[first * batch : (first + columns) * batch].view(batch, columns)


def _forward_fake(
    features, weight, labels, cosine_margin, angular_margin, scale, angular_multiplier,
    normalize_features, normalize_weight, class_offset, num_classes, ignore_index, keep, dtype,
    backend,
):  # fmt: skip
    batch, rows = features.shape[0], weight.shape[0]
    compute = compute_dtype(dtype)
    return (
        features.new_empty(batch, dtype=compute),
        features.new_empty(3, batch, dtype=compute),
        weight.new_empty(rows if normalize_weight else 0, dtype=compute),
        features.new_empty(batch * rows if keep else 0, dtype=dtype),
    )


@operator(
    "margin_softmax_forward(Tensor features, Tensor weight, Tensor labels, Tensor cosine_margin,"
    f" Tensor angular_margin, {SCHEMA}, bool keep, ScalarType dtype, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _forward_fake,
)
def forward(features, weight, labels, cosine_margin, angular_margin, *rest):
    """lse [B], targets [3, B], 1 / norms of the weight [N], kept products [B * N] or none."""
    *options, keep, dtype, backend = rest
    head = Head(features, weight, labels, Options(*options), dtype, backend)
    targets = head.empty(3, head.batch)
    head.run(
        "margin_softmax_targets", head.features, head.inverse_feature_norms, head.weight,
        head.labels, cosine_margin.contiguous(), angular_margin.contiguous(), head.options, targets,
    )  # fmt: skip
    if keep:
        products = _native.large_output(head.features, head.batch * len(weight), dtype)
    else:
        products = head.empty(head.batch * min(head.size, len(weight)), dtype=dtype)
    normalizer = head.empty(2, head.batch)
    with autocast_off(features.device.type):
        for first, rows, scales in head.chunks:
            chunk = chunk_of(products, first if keep else 0, head.batch, len(rows))
            torch.mm(head.operand, rows.t(), out=chunk)
            head.run(
                "margin_softmax_normalizer", chunk, scales, head.labels, targets,
                head.options.class_offset + first, head.options.scale, first == 0, normalizer,
            )  # fmt: skip
    lse = normalizer[0] + normalizer[1].log()
    return lse, targets, head.chunks.inverse_norms, products if keep else products.new_empty(0)


def _backward_fake(
    grad_losses, features, weight, labels, lse, targets, inverse_norms, products, scale,
    angular_multiplier, normalize_features, normalize_weight, class_offset, num_classes,
    ignore_index, wants_features, wants_weight, dtype, backend,
):  # fmt: skip
    return (
        features.new_empty(features.shape if wants_features else (0,)),
        weight.new_empty(weight.shape if wants_weight else (0,)),
    )


@operator(
    "margin_softmax_backward(Tensor grad_losses, Tensor features, Tensor weight, Tensor labels,"
    f" Tensor lse, Tensor targets, Tensor inverse_norms, Tensor products, {SCHEMA},"
    " bool wants_features, bool wants_weight, ScalarType dtype, str backend) -> (Tensor, Tensor)",
    _backward_fake,
)
def backward(grad_losses, features, weight, labels, lse, targets, inverse_norms, products, *rest):
    """The gradients of lse - target, times grad_losses [B]; empty where none is wanted."""
    *options, wants_features, wants_weight, dtype, backend = rest
    head = Head(features, weight, labels, Options(*options), dtype, backend, inverse_norms)
    coefficients, weight_gain, feature_gain = (
        head.empty(head.batch),
        head.empty(1),
        head.empty(head.batch),
    )
    head.run(
        "margin_softmax_coefficients", grad_losses.contiguous(), head.labels, targets,
        head.inverse_feature_norms, head.options, coefficients, weight_gain, feature_gain,
    )  # fmt: skip
    # What takes no part may hold anything, and 0 * NaN would spread.
    operand = torch.where(coefficients[:, None] == 0, 0, head.operand)
    raw_features = torch.zeros_like(operand, dtype=head.compute) if wants_features else None
    weight_gradient = WeightGradient(head, operand, weight_gain) if wants_weight else None
    scratch = head.empty(head.batch * min(head.size, len(weight)), dtype=dtype)
    with autocast_off(features.device.type):
        for first, rows, scales in head.chunks:
            gradient = chunk_of(scratch, 0, head.batch, len(rows))
            if len(products):
                chunk = chunk_of(products, first, head.batch, len(rows))
            else:
                chunk = torch.mm(operand, rows.t(), out=gradient)
            head.run(
                "margin_softmax_gradient", chunk, scales, head.labels, targets, lse, coefficients,
                head.options.class_offset + first, head.options.scale, gradient,
            )  # fmt: skip
            if raw_features is not None:
                add_product(raw_features, gradient, rows)
            if weight_gradient is not None:
                weight_gradient.write(first, gradient, scaled=len(scales) > 0)
    grad_features = features.new_empty(0)
    if raw_features is not None:
        if not head.options.normalize_features and head.options.normalize_weight:
            add_radial(raw_features, head, coefficients, lse, targets)
        grad_features = feature_gradient(head, raw_features, feature_gain)
    return grad_features, weight_gradient.grad if weight_gradient else weight.new_empty(0)


class WeightGradient:
    """The gradient [N, D] of the weight, written chunk by chunk."""

    def __init__(self, head: Head, operand: Tensor, gain: Tensor) -> None:
        self.head, self.operand, self.gain = head, operand, gain
        weight = head.weight
        self.grad = _native.large_output(weight, weight.numel(), weight.dtype).view(weight.shape)
        converted = 0 if weight.dtype == head.dtype else min(head.size, len(weight))
        self.raw = head.empty(converted, head.dimensions, dtype=head.dtype)

    def write(self, first: int, gradient: Tensor, scaled: bool) -> None:
        """From the gradient by a chunk's products, [B, C]; `scaled` as project_rows means it."""
        chunk = slice(first, first + gradient.shape[1])
        grad = self.grad[chunk]
        raw = self.raw[: len(grad)] if len(self.raw) else grad
        torch.mm(gradient.t(), self.operand, out=raw)
        if not self.head.options.normalize_weight:
            torch.mul(raw, self.gain, out=grad)
            return
        inverse_norms = self.head.chunks.inverse_norms[chunk]
        self.head.run(
            "project_rows", raw, self.head.weight[chunk], inverse_norms, self.gain, scaled, grad
        )


def add_radial(raw: Tensor, head: Head, coefficients: Tensor, lse: Tensor, targets: Tensor) -> None:
    """Along a feature, at a fixed angle, its target's logit grows by psi - margin."""
    # The 0 that stands for another shard's target may lie far above lse.
    change = torch.expm1((targets[0] - lse).clamp(max=0))
    radial = coefficients * change * targets[2] * head.inverse_feature_norms
    raw += radial[:, None] * head.features


def feature_gradient(head: Head, raw: Tensor, gain: Tensor) -> Tensor:
    """From the gradient [B, D] by what the weight's rows are multiplied with."""
    features, inverse_norms = head.features, head.inverse_feature_norms
    if head.options.normalize_features:
        grad = torch.empty_like(features)
        head.run("project_rows", raw, features, inverse_norms, gain, False, grad)
        return grad
    if head.options.normalize_weight:
        gain = torch.where(inverse_norms == 0, 0, gain)
    return torch.where(gain[:, None] == 0, 0, gain[:, None] * raw).to(features.dtype)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += torch.mm(left, right)
