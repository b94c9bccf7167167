"""The operators of the margin softmax.

The weight may be a shard, whose first row is class `class_offset` out of `num_classes`: then the
forward's lse is the shard's, the target of a sample whose class lies elsewhere is 0, and the
backward takes the lse over all shards.
"""

from __future__ import annotations

import torch
from torch import Tensor

from facelt_ext._operators import operator
from facelt_ext.functional._chunked_softmax import ChunkedSoftmax, Options, taking_part, times_gain
from facelt_ext.functional._products import (
    WeightChunks,
    chunk_size,
    operand_of,
    product_flops,
)
from facelt_ext.functional._weight_gradient import WeightGradient
from facelt_ext.types import compute_dtype

SCHEMA = (
    "float scale, SymInt angular_multiplier, bool normalize_features, bool normalize_weight,"
    " SymInt class_offset, SymInt num_classes, SymInt ignore_index"
)


class Head(ChunkedSoftmax):
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
        size = chunk_size(*features.shape, dtype, features.device.type)
        chunks = WeightChunks(
            self.weight, options.normalize_weight, dtype, size, backend, inverse_norms
        )
        self.inverse_norms = chunks.inverse_norms
        operand, self.inverse_feature_norms = operand_of(
            self.features, options.normalize_features, dtype, backend
        )
        super().__init__(operand, chunks, labels.contiguous(), options, backend)


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


def _forward_flops(features, weight, *_):
    return product_flops(len(features), *weight.shape)


@operator(
    "margin_softmax_forward(Tensor features, Tensor weight, Tensor labels, Tensor cosine_margin,"
    f" Tensor angular_margin, {SCHEMA}, bool keep, ScalarType dtype, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _forward_fake,
    flops=_forward_flops,
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
    lse, products = head.log_normalizers(targets, keep)
    return lse, targets, head.inverse_norms, products


def _backward_fake(
    grad_losses, features, weight, labels, lse, targets, inverse_norms, products, scale,
    angular_multiplier, normalize_features, normalize_weight, class_offset, num_classes,
    ignore_index, wants_features, wants_weight, dtype, backend,
):  # fmt: skip
    return (
        features.new_empty(features.shape if wants_features else (0,)),
        weight.new_empty(weight.shape if wants_weight else (0,)),
    )


def _backward_flops(_, features, weight, *rest):
    products, wants_features, wants_weight = rest[4], *rest[-4:-2]
    made = (products.numel() == 0) + wants_features + wants_weight
    return made * product_flops(len(features), *weight.shape)


@operator(
    "margin_softmax_backward(Tensor grad_losses, Tensor features, Tensor weight, Tensor labels,"
    f" Tensor lse, Tensor targets, Tensor inverse_norms, Tensor products, {SCHEMA},"
    " bool wants_features, bool wants_weight, ScalarType dtype, str backend) -> (Tensor, Tensor)",
    _backward_fake,
    flops=_backward_flops,
)
def backward(grad_losses, features, weight, labels, lse, targets, inverse_norms, products, *rest):
    """The gradients of lse - target, times grad_losses [B]; empty where none is wanted."""
    *options, wants_features, wants_weight, dtype, backend = rest
    head = Head(features, weight, labels, Options(*options), dtype, backend, inverse_norms)
    coefficients, weight_gain, feature_gain = head.coefficients(
        grad_losses, targets, head.inverse_feature_norms
    )
    head.operand = taking_part(head.operand, coefficients)
    raw_features = torch.zeros_like(head.operand, dtype=lse.dtype) if wants_features else None
    weight_gradient = None
    if wants_weight:
        norms = head.inverse_norms if head.options.normalize_weight else None
        weight_gradient = WeightGradient(
            head.weight, head.operand, weight_gain, head.chunks.size, backend, norms
        )
    write = weight_gradient.write if weight_gradient else None
    head.gradients(targets, lse, coefficients, products, raw_features, write)
    grad_features = features.new_empty(0)
    if raw_features is not None:
        if not head.options.normalize_features and head.options.normalize_weight:
            add_radial(raw_features, head, coefficients, lse, targets)
        grad_features = feature_gradient(head, raw_features, feature_gain)
    return grad_features, weight_gradient.grad if weight_gradient else weight.new_empty(0)


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
    return times_gain(raw, gain).to(features.dtype)
