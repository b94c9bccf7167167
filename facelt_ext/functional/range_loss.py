from __future__ import annotations

import torch
from torch import Tensor

from facelt_ext import _backend, _native, reference
from facelt_ext._checks import (
    check_count,
    check_flag,
    check_ignore_index,
    check_integers,
    check_matrix,
    check_number,
    is_exporting,
)
from facelt_ext._operators import operator
from facelt_ext.functional._second_order import gradient_through_reference
from facelt_ext.types import compute_dtype


def range_loss(
    features: Tensor,
    labels: Tensor,
    *,
    k: int = 2,
    margin: float = 2e4,
    alpha: float = 1e-5,
    beta: float = 1e-4,
    squared: bool = True,
    ignore_index: int | None = -100,
) -> Tensor:
    """Range Loss for long-tailed data (Zhang et al., arXiv:1611.08976, eqs. 1-7).

    `alpha * sum over classes of the harmonic mean of the class's k largest ranges
    + beta * max(margin - smallest distance of two class centroids, 0)`, over one batch. To be added
    to a classification loss; the paper's weights are for unnormalised features.

    Classes with one sample have no intra term, classes with fewer than k pairs take those they
    have, a range of 0 makes its class's term 0 with gradient 0, and with fewer than two classes
    there is no inter term. An empty batch gives 0. Features that are not finite give NaN.

    Args:
        features: [B, D], float64, float32, bfloat16 or float16.
        labels: [B], any integers.
        k: ranges per class, at least 1; time and memory (B·k) grow with it.
        margin: of the inter term, in the units of the distance (squared, if `squared`).
        alpha: weight of the intra term.
        beta: weight of the inter term.
        squared: squared Euclidean distances, as in the paper; otherwise the distances.
        ignore_index: samples with this label take no part, and their gradient is 0, whatever their
            features are. None: every label is a class.

    Returns:
        The loss, []: float64 for float64 features, float32 otherwise. There is no host
        synchronisation on CUDA.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range.
    """
    features = check_matrix(features, "features")
    labels = check_integers(labels, "labels", features, "features")
    k = check_count(k, "k")
    dtype = compute_dtype(features.dtype)
    margin = check_number(margin, "margin", dtype)
    alpha = check_number(alpha, "alpha", dtype)
    beta = check_number(beta, "beta", dtype)
    squared = check_flag(squared, "squared")
    ignore_index = check_ignore_index(ignore_index)
    backend = _backend.of_call("range_loss", features)
    # No class has more pairs than the batch; larger numbers would only cost memory.
    k = max(1, min(k, features.shape[0] * (features.shape[0] - 1) // 2))
    if backend == "reference":
        return reference.range_loss(
            features, labels, k=k, margin=margin, alpha=alpha, beta=beta, squared=squared,
            ignore_index=ignore_index,
        )  # fmt: skip
    options = (k, float(margin), float(alpha), float(beta), squared, ignore_index)
    if is_exporting():
        return _forward(features, labels, *options, backend)[0]
    return RangeLossFunction.apply(features, labels, options, backend)


class RangeLossFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, labels, options, backend):
        loss, state_index, state_value = _forward(features, labels, *options, backend)
        ctx.save_for_backward(features, labels, state_index, state_value)
        ctx.options, ctx.backend = options, backend
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        features, labels, state_index, state_value = ctx.saved_tensors
        k, margin, alpha, beta, squared, ignore_index = ctx.options
        if torch.is_grad_enabled():

            def again(x: Tensor) -> Tensor:
                return reference.range_loss(
                    x, labels, k=k, margin=margin, alpha=alpha, beta=beta, squared=squared,
                    ignore_index=ignore_index,
                )  # fmt: skip

            grad = gradient_through_reference(again, features, grad_loss)
        else:
            grad = _backward(grad_loss, features, k, state_index, state_value, ctx.backend)
        return grad, None, None, None


def _forward_fake(features, labels, k, margin, alpha, beta, squared, ignore_index, backend):
    batch, dimensions = features.shape
    dtype = compute_dtype(features.dtype)
    # The state is laid out in csrc/range_loss_state.h.
    return (
        features.new_empty((), dtype=dtype),
        labels.new_empty(2 * batch + 1 + 2 * batch * k + 2),
        features.new_empty(batch * k + dimensions + 1, dtype=dtype),
    )


def _setup_context(ctx, inputs, output):
    features, _, k, *_, backend = inputs
    ctx.save_for_backward(features, *output[1:])
    ctx.k, ctx.backend = k, backend
    ctx.mark_non_differentiable(*output[1:])


def _gradient(ctx, grad_loss, *_):
    features, *state = ctx.saved_tensors
    return _backward(grad_loss, features, ctx.k, *state, ctx.backend), *[None] * 8


@operator(
    "range_loss_forward(Tensor features, Tensor labels, SymInt k, float margin, float alpha,"
    " float beta, bool squared, SymInt? ignore_index, str backend) -> (Tensor, Tensor, Tensor)",
    _forward_fake,
    gradient=(_setup_context, _gradient),
)
def _forward(features, labels, k, margin, alpha, beta, squared, ignore_index, backend):
    features, labels = features.contiguous(), labels.contiguous()
    options = (k, margin, alpha, beta, squared, ignore_index)
    outputs = _forward_fake(features, labels, *options, backend)
    workspace = _native.workspace(
        backend, features, "range_loss", *features.shape, k, outputs[0].element_size()
    )
    _native.run(
        backend, features, "range_loss_forward", features, labels, options, *outputs, workspace
    )
    return outputs


def _backward_fake(grad_loss, features, k, state_index, state_value, backend):
    return torch.empty_like(features, memory_format=torch.contiguous_format)


@operator(
    "range_loss_backward(Tensor grad_loss, Tensor features, SymInt k, Tensor state_index,"
    " Tensor state_value, str backend) -> Tensor",
    _backward_fake,
)
def _backward(grad_loss, features, k, state_index, state_value, backend):
    features = features.contiguous()
    grad_features = torch.empty_like(features)
    _native.run(
        backend, features, "range_loss_backward", grad_loss, features, k, state_index, state_value,
        grad_features,
    )  # fmt: skip
    return grad_features
