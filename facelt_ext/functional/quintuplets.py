from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from facelt_ext import _backend, _native, reference
from facelt_ext._autocast import autocast_off
from facelt_ext._checks import (
    check_choice,
    check_ignore_index,
    check_integers,
    check_matrix,
    check_number,
    is_exporting,
)
from facelt_ext._operators import operator
from facelt_ext.functional._reductions import REDUCTIONS
from facelt_ext.functional._second_order import gradient_through_reference
from facelt_ext.types import compute_dtype


def quintuplet_loss(
    features: Tensor,
    labels: Tensor,
    cluster_index: Tensor,
    *,
    margins: Sequence[float],
    reduction: str = "mean",
    ignore_index: int | None = -100,
) -> Tensor:
    """The triple-header hinge loss over quintuplets (LMLE, Huang et al., CVPR 2016; TPAMI 2020,
    eqs. 4-5), mined in the batch.

    With D the squared Euclidean distance, each sample is an anchor of the loss

        [g1 + D(p+) - D(p-)]_+ + [g2 + D(p-) - D(p--)]_+ + [g3 + D(p--) - D(n)]_+

    where p+ is the most distant sample of its cluster, p- the nearest of its class in another
    cluster, p-- the most distant of its class, and n the nearest of another class; of equally
    distant ones the first in the batch. A cluster is a pair of label and cluster_index. An anchor
    that lacks one of the four skips the hinges that need it; a hinge has no gradient at 0.

    Args:
        features: [B, D], float64, float32, bfloat16 or float16, as a rule of length 1, which is
            left to the caller.
        labels: [B], any integers.
        cluster_index: [B], any integers.
        margins: g1, g2 and g3, in squared distances.
        reduction: "mean" over the anchors with at least one hinge (of none it is 0), "sum" or
            "none".
        ignore_index: samples with this label are no anchors and nobody's neighbors; their loss and
            their gradient are 0, whatever their features are. None: every label is a class.

    All is reckoned in float32 (float64 for float64), halves too. No B x B tensor is made.

    Returns:
        The loss, [] or [B]: float64 for float64 features, float32 otherwise. A feature that is not
        finite makes all of it NaN, as every anchor is compared with every sample. There is no host
        synchronisation on CUDA.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range.
    """
    features = check_matrix(features, "features")
    labels = check_integers(labels, "labels", features, "features")
    cluster_index = check_integers(cluster_index, "cluster_index", features, "features")
    dtype = compute_dtype(features.dtype)
    margins = check_margins(margins, dtype)
    reduction = check_choice(reduction, "reduction", REDUCTIONS)
    ignore_index = check_ignore_index(ignore_index)
    backend = _backend.of_call("quintuplet_loss", features)
    if backend == "reference":
        with autocast_off(features.device.type):
            return reference.quintuplet_loss(
                features, labels, cluster_index, margins=margins, reduction=reduction,
                ignore_index=ignore_index,
            )  # fmt: skip
    arguments = (
        features.to(dtype), labels, cluster_index, *margins, reduction, ignore_index, backend,
    )  # fmt: skip
    return _forward(*arguments)[0] if is_exporting() else QuintupletFunction.apply(*arguments)


def check_margins(margins: Sequence[float], dtype: torch.dtype) -> tuple[float, float, float]:
    if not isinstance(margins, (tuple, list)):
        raise TypeError(f"margins: expected three numbers, got {type(margins).__name__}")
    if len(margins) != 3:
        raise ValueError(f"margins: expected three numbers, got {len(margins)}")
    g1, g2, g3 = (check_number(each, f"margins[{i}]", dtype) for i, each in enumerate(margins))
    return g1, g2, g3


class QuintupletFunction(torch.autograd.Function):
    """For features in the compute dtype."""

    @staticmethod
    def forward(ctx, features, labels, cluster_index, *options):
        loss, *state = _forward(features, labels, cluster_index, *options)
        ctx.save_for_backward(features, labels, cluster_index, *state)
        ctx.options = options
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        features, labels, cluster_index, *state = ctx.saved_tensors
        if torch.is_grad_enabled():
            *margins, reduction, ignore_index, _ = ctx.options

            def again(x: Tensor) -> Tensor:
                return reference.quintuplet_loss(
                    x, labels, cluster_index, margins=margins, reduction=reduction,
                    ignore_index=ignore_index,
                )  # fmt: skip

            grad = gradient_through_reference(again, features, grad_loss)
        else:
            grad = _backward(grad_loss, features, *state, *ctx.options)
        return grad, *[None] * 8


OPTIONS = "float g1, float g2, float g3, str reduction, SymInt? ignore_index, str backend"


def _native_options(
    g1: float, g2: float, g3: float, reduction: str, ignore_index: int | None
) -> tuple:
    return g1, g2, g3, REDUCTIONS.index(reduction), ignore_index


def _forward_fake(features, labels, cluster_index, g1, g2, g3, reduction, ignore_index, backend):
    batch = features.shape[0]
    # The state is laid out in csrc/quintuplets.h.
    return (
        features.new_empty(batch if reduction == "none" else ()),
        labels.new_empty(batch, 4),
        features.new_empty(4 * batch + 2),
    )


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], *output[1:])
    ctx.options = inputs[3:]
    ctx.mark_non_differentiable(*output[1:])


def _gradient(ctx, grad_loss, *_):
    return _backward(grad_loss, *ctx.saved_tensors, *ctx.options), *[None] * 8


@operator(
    "quintuplet_forward(Tensor features, Tensor labels, Tensor cluster_index,"
    f" {OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _forward_fake,
    gradient=(_setup_context, _gradient),
)
def _forward(features, labels, cluster_index, *rest):
    """loss [] or [B], neighbors of the anchors [B, 4], state."""
    *options, backend = rest
    features = features.contiguous()
    outputs = _forward_fake(features, labels, cluster_index, *rest)
    workspace = _native.workspace(
        backend, features, "quintuplet", len(features), features.element_size()
    )
    _native.run(
        backend, features, "quintuplet_forward", features, labels.contiguous(),
        cluster_index.contiguous(), _native_options(*options), *outputs, workspace,
    )  # fmt: skip
    return outputs


def _backward_fake(
    grad_loss, features, neighbors, state, g1, g2, g3, reduction, ignore_index, backend
):
    return torch.empty_like(features, memory_format=torch.contiguous_format)


@operator(
    "quintuplet_backward(Tensor grad_loss, Tensor features, Tensor neighbors, Tensor state,"
    f" {OPTIONS}) -> Tensor",
    _backward_fake,
)
def _backward(grad_loss, features, neighbors, state, *rest):
    *options, backend = rest
    features = features.contiguous()
    grad_features = torch.empty_like(features)
    _native.run(
        backend, features, "quintuplet_backward", grad_loss.contiguous(), features,
        _native_options(*options), neighbors, state, grad_features,
    )  # fmt: skip
    return grad_features
