from __future__ import annotations

import torch
from torch import Tensor

from facelt_ext import _backend, reference
from facelt_ext._autocast import autocast_off
from facelt_ext._checks import (
    check_choice,
    check_class_range,
    check_integer,
    check_integers,
    check_matrix,
)
from facelt_ext.functional._dispersion_operators import backward, forward, parts_of
from facelt_ext.functional._products import (
    WORKSPACES,
    convertible,
    keeps_products,
    product_dtype,
)
from facelt_ext.functional._reductions import REDUCTIONS
from facelt_ext.functional._second_order import gradients_through_reference, wanted_gradients
from facelt_ext.functional.super_classes import SuperClassIndex, members_of
from facelt_ext.reference.margin_softmax import reduced


def dispersion_softmax_loss(
    features: Tensor,
    head_weight: Tensor,
    tail_weight: Tensor,
    super_class: Tensor | SuperClassIndex,
    labels: Tensor,
    *,
    num_super_classes: int | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    workspace: str = "auto",
) -> Tensor:
    """Softmax cross-entropy in which only the sample's own super class is dispersed
    (Aggregate-and-Disperse, Ma et al. 2020, eqs. 6-8).

    The classes are N_h heads and, after them, N_t tails, which belong to S super classes. With w
    the classes' rows and Phi_s the mean row of super class s,

        loss = log(sum_h exp(w_h . f) + sum_s exp(Phi_s . f)) - w_y . f

    where, for a sample of a tail, the term of its own super class is replaced by those of its
    members, sum_{i in s} exp(w_i . f). Every other super class counts once: the 1 / n of eq. 6 for
    each of its n members adds up to 1. The cost is that of N_h + S logits.

    Args:
        features: [B, D], float64, float32, bfloat16 or float16.
        head_weight: [N_h, D], in the features' dtype or float32; N_h may be 0.
        tail_weight: [N_t, D], in the same dtype; N_t may be 0.
        super_class: a `SuperClassIndex` of the N_t tails, or [N_t] integers in [0, S). The second
            is checked and sorted at every call, for which a GPU is waited for.
        num_super_classes: S; None: what `super_class` says. torch.compile needs the number where
            `super_class` is a tensor.
        labels: [B], integers in [0, N_h + N_t), heads first, or `ignore_index`.
        reduction: "mean" (over the samples that are not ignored; of none it is 0), "sum" or "none".
        ignore_index: samples with this label have loss 0 and gradient 0.
        workspace: "low", "high" or "auto", as in `margin_softmax_loss`, for N_h + S classes.

    Products are made in the features' dtype, or autocast's; everything between them in float32
    (float64 for float64), and so are the logits of the members of dispersed super classes.

    Returns:
        The loss, [] or [B]: float64 for float64 features, float32 otherwise. With a
        `SuperClassIndex` there is no host synchronisation on CUDA: there a label out of range makes
        the loss NaN, and its sample's feature gradient; `facelt_ext.debug_checks(True)` makes it a
        ValueError, as on the CPU. A tail whose super class no sample belongs to gets the same
        gradient as the super class's other members, that of their mean divided by their number.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range.
    """
    features = check_matrix(features, "features")
    head_weight = _check_rows(head_weight, "head_weight", features)
    tail_weight = _check_rows(tail_weight, "tail_weight", features)
    if head_weight.dtype != tail_weight.dtype:
        raise TypeError(
            f"tail_weight: expected dtype {head_weight.dtype}, as head_weight, got "
            f"{tail_weight.dtype}"
        )
    return dispersion_loss(
        features, head_weight, tail_weight, super_class, labels, reduction, ignore_index,
        workspace, num_super_classes,
    )  # fmt: skip


def dispersion_loss(
    features: Tensor,
    weight: Tensor,
    tail_weight: Tensor | None,
    super_class: Tensor | SuperClassIndex,
    labels: Tensor,
    reduction: str,
    ignore_index: int,
    workspace: str,
    num_super_classes: int | None = None,
) -> Tensor:
    """The same where the tails' rows may be the last of `weight`, so that it has one gradient."""
    index, order, offsets = members_of(super_class, num_super_classes, check=True)
    num_tail, count = len(index), len(offsets) - 1
    head, tail = parts_of(weight, tail_weight, num_tail)
    if num_tail != len(tail) or index.device != features.device:
        raise ValueError(
            f"super_class: expected shape [{len(tail)}] on {features.device}, one for each row of "
            f"tail_weight, got [{num_tail}] on {index.device}"
        )
    labels = check_integers(labels, "labels", features, "features")
    num_classes = len(head) + num_tail
    if num_classes == 0:
        raise ValueError("head_weight, tail_weight: expected a row in one of them, got none")
    name = "weight" if tail_weight is None else "head_weight"
    dtype = product_dtype(features.dtype, weight.dtype, features.device.type, name)
    features, weight = convertible(features, dtype), convertible(weight, dtype)
    if tail_weight is not None:
        tail_weight = convertible(tail_weight, dtype)
    ignore_index = check_integer(ignore_index, "ignore_index")
    reduction = check_choice(reduction, "reduction", REDUCTIONS)
    workspace = check_choice(workspace, "workspace", WORKSPACES)
    inputs = (features, weight) if tail_weight is None else (features, weight, tail_weight)
    backend = _backend.of_call("dispersion_softmax_loss", *inputs, traceable=True)
    if backend == "reference" or _backend.debugging():
        check_class_range(labels, "labels", num_classes, ignore_index)
    if backend == "reference":
        with autocast_off(features.device.type):
            return reference.dispersion_softmax_loss(
                features, *parts_of(weight, tail_weight, num_tail), index, labels,
                reduction=reduction, ignore_index=ignore_index, num_super_classes=count,
            )  # fmt: skip
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    keep = wants_gradient and keeps_products(workspace, features, len(head) + count, dtype)
    losses = DispersionSoftmaxFunction.apply(
        features, weight, tail_weight, labels, index, order, offsets, ignore_index, keep, dtype,
        backend,
    )  # fmt: skip
    return reduced(losses, labels != ignore_index, reduction)


def _check_rows(weight: Tensor, name: str, features: Tensor) -> Tensor:
    weight = check_matrix(weight, name)
    if weight.shape[1] != features.shape[1]:
        raise ValueError(
            f"{name}: expected shape [classes, {features.shape[1]}], the features' dimensions, got "
            f"{list(weight.shape)}"
        )
    if weight.device != features.device:
        raise ValueError(
            f"{name}: expected device {features.device}, where features is, got {weight.device}"
        )
    return weight


class DispersionSoftmaxFunction(torch.autograd.Function):
    """The loss of each sample, [B]. Without a tail_weight the tails' rows are the weight's last."""

    @staticmethod
    def forward(
        ctx, features, weight, tail_weight, labels, index, order, offsets, ignore_index, keep,
        dtype, backend,
    ):  # fmt: skip
        lse, classes, targets, means, products = forward(
            features, weight, tail_weight, labels, index, order, offsets, ignore_index, keep, dtype,
            backend,
        )  # fmt: skip
        ctx.save_for_backward(
            features, weight, tail_weight, labels, index, order, offsets, lse, classes, targets,
            means, products,
        )  # fmt: skip
        ctx.ignore_index, ctx.dtype, ctx.backend = ignore_index, dtype, backend
        return torch.where(labels == ignore_index, 0, lse - targets[2])

    @staticmethod
    def backward(ctx, grad_losses):
        features, weight, tail_weight, labels, index, *state = ctx.saved_tensors
        wanted = wanted_gradients(ctx, 3)
        if not torch.is_grad_enabled():
            grads = backward(
                grad_losses, features, weight, tail_weight, labels, index, *state, *wanted,
                ctx.dtype, ctx.backend,
            )  # fmt: skip
            grads = [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
            return *grads, *[None] * 8
        # The reference would follow a label out of range.
        rows = len(weight) + (0 if tail_weight is None else len(tail_weight))
        invalid = (labels != ctx.ignore_index) & ((labels < 0) | (labels >= rows))
        valid = torch.where(invalid, ctx.ignore_index, labels)

        def again(features: Tensor, weight: Tensor, tail_weight: Tensor | None) -> Tensor:
            return reference.dispersion_softmax_loss(
                features, *parts_of(weight, tail_weight, len(index)), index, valid,
                reduction="none", ignore_index=ctx.ignore_index,
            )  # fmt: skip

        inputs = (features, weight, tail_weight)
        grads = gradients_through_reference(again, inputs, wanted, grad_losses)
        if wanted[0]:
            grads[0] = torch.where(invalid[:, None], torch.nan, grads[0])
        return *grads, *[None] * 8
