"""The operators of the dispersion softmax: the margin softmax's chunks over heads and super
classes, and kernels of its own for the super classes that are dispersed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from facelt_ext import _native
from facelt_ext._operators import operator
from facelt_ext.functional._chunked_softmax import (
    ChunkedSoftmax,
    Options,
    taking_part,
    times_gain,
)
from facelt_ext.functional._label_map import IGNORED
from facelt_ext.functional._products import (
    JoinedChunks,
    WeightChunks,
    chunk_size,
    operand_of,
    product_flops,
)
from facelt_ext.functional._weight_gradient import WeightGradient
from facelt_ext.functional.super_classes import segment_mean
from facelt_ext.types import compute_dtype


class Dispersion(ChunkedSoftmax):
    """What forward and backward of one call have in common.

    Its classes are the heads and the super classes. A tail's sample has the log of the sum over its
    super class's members in place of its super class's logit.
    """

    def __init__(
        self,
        features: Tensor,
        weight: Tensor,
        tail_weight: Tensor | None,
        means: Tensor,
        num_tail: int,
        classes: Tensor,
        dtype: torch.dtype,
        backend: str,
    ) -> None:
        parts = parts_of(weight, tail_weight, num_tail)
        self.head, self.tail = (part.contiguous() for part in parts)
        self.features = features.to(compute_dtype(dtype)).contiguous()
        operand, self.inverse_feature_norms = operand_of(self.features, False, dtype, backend)
        size = chunk_size(*features.shape, dtype, features.device.type)
        chunks = JoinedChunks(
            WeightChunks(self.head, False, dtype, size, backend),
            WeightChunks(means, False, dtype, size, backend),
        )
        options = Options(1.0, 1, False, False, 0, len(self.head) + len(means), IGNORED)
        super().__init__(operand, chunks, classes, options, backend)


def parts_of(weight: Tensor, tail_weight: Tensor | None, num_tail: int) -> tuple[Tensor, Tensor]:
    """The heads' rows and the tails', which are the last of the weight if they are not given."""
    if tail_weight is not None:
        return weight, tail_weight
    heads = len(weight) - num_tail
    return weight[:heads], weight[heads:]


def _forward_fake(
    features, weight, tail_weight, labels, super_class, order, offsets, ignore_index, keep, dtype,
    backend,
):  # fmt: skip
    batch, dimensions = features.shape
    count = offsets.shape[0] - 1
    heads = weight.shape[0] - (super_class.shape[0] if tail_weight is None else 0)
    compute = compute_dtype(dtype)
    return (
        features.new_empty(batch, dtype=compute),
        labels.new_empty(batch),
        features.new_empty(3, batch, dtype=compute),
        features.new_empty(count, dimensions, dtype=dtype),
        features.new_empty(batch * (heads + count) if keep else 0, dtype=dtype),
    )


def _flops(features, weight, tail_weight, super_class, offsets, heads, super_classes):
    """Of as many products with the heads' rows and with the super classes' means."""
    num_heads = len(parts_of(weight, tail_weight, len(super_class))[0])
    rows = heads * num_heads + super_classes * (len(offsets) - 1)
    return product_flops(len(features), rows, features.shape[1])


def _forward_flops(features, weight, tail_weight, _, super_class, order, offsets, *rest):
    return _flops(features, weight, tail_weight, super_class, offsets, 1, 1)


@operator(
    "dispersion_softmax_forward(Tensor features, Tensor weight, Tensor? tail_weight, Tensor labels,"
    " Tensor super_class, Tensor order, Tensor offsets, SymInt ignore_index, bool keep,"
    " ScalarType dtype, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward_fake,
    flops=_forward_flops,
)
def forward(
    features, weight, tail_weight, labels, super_class, order, offsets, ignore_index, keep, dtype,
    backend,
):  # fmt: skip
    """lse [B], classes [B] and targets [3, B] as csrc/launchers.inc has them, means [S, D] of the
    super classes, kept products [B * (N_h + S)] or none."""
    tail = parts_of(weight, tail_weight, len(super_class))[1]
    means = segment_mean(tail, order, offsets, dtype, backend)
    classes = torch.empty_like(labels, memory_format=torch.contiguous_format)
    call = Dispersion(
        features, weight, tail_weight, means, len(super_class), classes, dtype, backend
    )
    targets = call.empty(3, call.batch)
    call.run(
        "dispersion_targets", call.features, call.head, call.tail, labels.contiguous(), super_class,
        order, offsets, ignore_index, classes, targets,
    )  # fmt: skip
    lse, products = call.log_normalizers(targets, keep)
    return lse, classes, targets, means, products


def _backward_fake(
    grad_losses, features, weight, tail_weight, labels, super_class, order, offsets, lse, classes,
    targets, means, products, wants_features, wants_weight, wants_tail, dtype, backend,
):  # fmt: skip
    tail = tail_weight.shape if wants_tail and tail_weight is not None else (0,)
    return (
        features.new_empty(features.shape if wants_features else (0,)),
        weight.new_empty(weight.shape if wants_weight else (0,)),
        weight.new_empty(tail),
    )


def _backward_flops(_, features, weight, tail_weight, labels, super_class, order, offsets, *rest):
    products, wants_features, wants_weight, wants_tail = rest[4], *rest[-5:-2]
    both = (products.numel() == 0) + wants_features
    tails = both + (wants_weight if tail_weight is None else wants_tail)
    return _flops(features, weight, tail_weight, super_class, offsets, both + wants_weight, tails)


@operator(
    "dispersion_softmax_backward(Tensor grad_losses, Tensor features, Tensor weight,"
    " Tensor? tail_weight, Tensor labels, Tensor super_class, Tensor order, Tensor offsets,"
    " Tensor lse, Tensor classes, Tensor targets, Tensor means, Tensor products,"
    " bool wants_features, bool wants_weight, bool wants_tail, ScalarType dtype, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _backward_fake,
    flops=_backward_flops,
)
def backward(
    grad_losses, features, weight, tail_weight, labels, super_class, order, offsets, lse, classes,
    targets, means, products, wants_features, wants_weight, wants_tail, dtype, backend,
):  # fmt: skip
    """The gradients of the losses times grad_losses [B]; empty where none is wanted."""
    call = Dispersion(
        features, weight, tail_weight, means, len(super_class), classes, dtype, backend
    )
    coefficients, weight_gain, feature_gain = call.coefficients(
        grad_losses, targets, call.inverse_feature_norms
    )
    call.operand = taking_part(call.operand, coefficients)
    part = Dispersed(call, labels.contiguous(), order, offsets, lse, coefficients)
    joint = tail_weight is None
    grad_weight = empty_gradient(weight, wants_weight)
    grad_tail = weight.new_empty(0) if joint else empty_gradient(tail_weight, wants_tail)
    head, tail = parts_of(grad_weight, None if joint else grad_tail, len(super_class))
    write_head = write_tail = None
    if wants_weight:
        size = call.chunks.size
        write_head = WeightGradient(call.head, call.operand, weight_gain, size, backend, None, head)
    if wants_weight if joint else wants_tail:
        write_tail = TailGradient(part, weight_gain, tail)

    def write(first: int, gradient: Tensor, scales: Tensor) -> None:
        if first >= len(call.head):
            if write_tail:
                write_tail.write(first - len(call.head), gradient)
        elif write_head:
            write_head.write(first, gradient, scales)

    raw_features = torch.zeros_like(call.features) if wants_features else None
    call.gradients(targets, lse, coefficients, products, raw_features, write)
    if raw_features is None:
        return features.new_empty(0), grad_weight, grad_tail
    part.add_to_features(raw_features)
    grad_features = times_gain(raw_features, feature_gain).to(features.dtype)
    return grad_features, grad_weight, grad_tail


def empty_gradient(weight: Tensor, wanted: bool) -> Tensor:
    if not wanted:
        return weight.new_empty(0)
    return _native.large_output(weight, weight.numel(), weight.dtype).view(weight.shape)


class Dispersed:
    """What a backward's kernels for the dispersed super classes have in common."""

    def __init__(
        self,
        call: Dispersion,
        labels: Tensor,
        order: Tensor,
        offsets: Tensor,
        lse: Tensor,
        coefficients: Tensor,
    ) -> None:
        self.call, self.labels = call, labels
        self.order, self.offsets = order, offsets
        self.lse, self.coefficients = lse, coefficients

    def add_to_features(self, raw_features: Tensor) -> None:
        call = self.call
        call.run(
            "dispersion_feature_gradient", call.features, call.tail, self.labels, call.labels,
            self.order, self.offsets, self.lse, self.coefficients, len(call.head), raw_features,
        )  # fmt: skip


class TailGradient:
    """The gradient of the tails' weight, written chunk of super classes by chunk."""

    def __init__(self, part: Dispersed, gain: Tensor, grad: Tensor) -> None:
        self.part, self.gain, self.grad = part, gain, grad
        call = part.call
        count = len(part.offsets) - 1
        self.raw = call.operand.new_empty(min(call.chunks.size, count), call.operand.shape[1])
        self.sample_order = torch.argsort(call.labels, stable=True)
        bounds = torch.arange(count + 1, device=call.labels.device) + len(call.head)
        self.sample_offsets = torch.searchsorted(call.labels[self.sample_order], bounds)

    def write(self, first: int, gradient: Tensor) -> None:
        """From the gradient by the products with a chunk's means, [B, C]."""
        part, call = self.part, self.part.call
        raw = self.raw[: gradient.shape[1]]
        torch.mm(gradient.t(), call.operand, out=raw)
        call.run(
            "dispersion_tail_gradient", raw, self.gain, call.features, call.tail, part.labels,
            part.order, part.offsets, self.sample_order, self.sample_offsets, part.lse,
            part.coefficients, len(call.head), first, self.grad,
        )  # fmt: skip
