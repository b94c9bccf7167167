from __future__ import annotations

import torch
from torch import Tensor

from facelt_ext import _backend, reference
from facelt_ext._autocast import autocast_off
from facelt_ext._checks import (
    check_choice,
    check_class_range,
    check_count,
    check_flag,
    check_integer,
    check_integers,
    check_margin,
    check_positive,
    check_weight,
)
from facelt_ext.functional._margin_softmax_operators import backward, forward
from facelt_ext.functional._products import (
    WORKSPACES,
    convertible,
    keeps_products,
    product_dtype,
)
from facelt_ext.functional._reductions import REDUCTIONS
from facelt_ext.functional._second_order import (
    gradients_through_reference,
    wanted_gradients,
)
from facelt_ext.reference.margin_softmax import reduced
from facelt_ext.types import compute_dtype

# An angle of up to pi times this is exact to a few units in the last place of float64.
LARGEST_MULTIPLIER = 1000


def margin_softmax_loss(
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    scale: float = 64.0,
    cosine_margin: float | Tensor = 0.0,
    angular_margin: float | Tensor = 0.0,
    angular_multiplier: int = 1,
    normalize_features: bool = True,
    normalize_weight: bool = True,
    reduction: str = "mean",
    ignore_index: int = -100,
    workspace: str = "auto",
) -> Tensor:
    """Softmax cross-entropy over the classes' cosines, with a margin on the target's.

    The logit of class n is `scale * cos(theta_n)`, that of the target
    `scale * (psi(angular_multiplier * theta + angular_margin) - cosine_margin)`, where psi is the
    cosine, continued so that it falls beyond pi. This is CosFace (Wang et al., arXiv:1801.09414,
    eq. 4), ArcFace (Deng et al., arXiv:1801.07698, eq. 3), SphereFace (Liu et al.,
    arXiv:1704.08063, eq. 7), and plain softmax with neither normalisation. Gradients are the true
    derivatives; at |cos(theta)| = 1, where that of an angular margin grows without bound, it is
    taken as where sin(theta) = 1e-4. A row of zeros has cosine 0, with gradient 0.

    No tensor of the size of the classes times the batch is made (but see `workspace`), and, for a
    contiguous weight, none of its size beside its gradient.

    Args:
        features: [B, D], float64, float32, bfloat16 or float16.
        weight: [N, D], a row per class, in the features' dtype or float32.
        labels: [B], integers in [0, N) or `ignore_index`.
        scale: of the cosines, positive.
        cosine_margin: taken off the target's cosine; a number, one per class [N] or one per sample
            [B, 1]. No gradient goes to it.
        angular_margin: added to the target's angle, in radians, in [0, pi]; as above.
        angular_multiplier: of the target's angle, an integer in [1, 1000].
        normalize_features: False multiplies each sample's logits with the norm of its feature.
        normalize_weight: False takes the rows as they are, and allows no margin.
        reduction: "mean" (over the samples that are not ignored; of none it is 0), "sum" or "none".
        ignore_index: samples with this label have loss 0 and gradient 0.
        workspace: "low" keeps no products for the backward and computes them again: four matrix
            products. "high" keeps B * N of them: three. "auto" is "high" while they take up to 256
            MiB on the CPU, 512 MiB on a GPU. Both take, besides the gradients, a few times B * D
            numbers, N numbers (the rows' norms), and what a chunk of classes needs: B products for
            each of its classes, which are 2 MiB of products on the CPU and 128 MiB on a GPU, or D
            classes if that is more; and rows of the weight, up to 4 or 64 MiB, if it is converted.

    Products are made in the features' dtype, or autocast's; everything between them in float32
    (float64 for float64). With half features and a float32 weight, the weight is converted chunk by
    chunk, and its gradient is float32.

    Returns:
        The loss, [] or [B]: float64 for float64 features, float32 otherwise. There is no host
        synchronisation on CUDA: there a label out of range makes the loss NaN, and its sample's
        feature gradient; `facelt_ext.debug_checks(True)` makes it a ValueError, as on the CPU.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range.
    """
    weight, features = check_weight(weight, features)
    labels = check_integers(labels, "labels", features, "features")
    dtype = product_dtype(features.dtype, weight.dtype, features.device.type)
    features, weight = convertible(features, dtype), convertible(weight, dtype)
    compute = compute_dtype(dtype)
    scale = check_positive(scale, "scale", compute)
    angular_multiplier = check_count(
        angular_multiplier, "angular_multiplier", maximum=LARGEST_MULTIPLIER
    )
    ignore_index = check_integer(ignore_index, "ignore_index")
    reduction = check_choice(reduction, "reduction", REDUCTIONS)
    workspace = check_choice(workspace, "workspace", WORKSPACES)
    normalize_features = check_flag(normalize_features, "normalize_features")
    normalize_weight = check_flag(normalize_weight, "normalize_weight")
    cosine_margin = check_margin(cosine_margin, "cosine_margin", features, weight)
    angular_margin = check_margin(angular_margin, "angular_margin", features, weight, angle=True)
    if not normalize_weight and (
        angular_multiplier > 1 or _has_margin(cosine_margin, angular_margin)
    ):
        raise ValueError("normalize_weight: margins need it to be True, got False")
    classes = weight.shape[0]
    backend = _backend.of_call("margin_softmax_loss", features, weight, traceable=True)
    if backend == "reference" or _backend.debugging():
        check_class_range(labels, "labels", classes, ignore_index)
    if backend == "reference":
        with autocast_off(features.device.type):
            return reference.margin_softmax_loss(
                features, weight, labels, scale=scale, cosine_margin=cosine_margin,
                angular_margin=angular_margin, angular_multiplier=angular_multiplier,
                normalize_features=normalize_features, normalize_weight=normalize_weight,
                reduction=reduction, ignore_index=ignore_index,
            )  # fmt: skip
    options = (
        float(scale), angular_multiplier, normalize_features, normalize_weight, 0,
        classes, ignore_index,
    )  # fmt: skip
    wants_gradient = torch.is_grad_enabled() and (features.requires_grad or weight.requires_grad)
    keep = wants_gradient and keeps_products(workspace, features, classes, dtype)
    losses = MarginSoftmaxFunction.apply(
        features, weight, labels, _margins_of(cosine_margin, labels, classes, compute),
        _margins_of(angular_margin, labels, classes, compute), options, keep, dtype, backend,
    )  # fmt: skip
    return reduced(losses, labels != ignore_index, reduction)


def _has_margin(*margins: float | Tensor) -> bool:
    return any(isinstance(margin, Tensor) or margin != 0 for margin in margins)


def _margins_of(margin: float | Tensor, labels: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """Each sample's margin, [B]; what a label out of range gets is never used."""
    if not isinstance(margin, Tensor):
        if torch.compiler.is_compiling():
            # Filled with a number that changes, it would be compiled anew for each.
            return torch.ones(labels.shape, dtype=dtype, device=labels.device) * margin
        return torch.full(labels.shape, margin, dtype=dtype, device=labels.device)
    own = margin[:, 0] if margin.ndim == 2 else margin[labels.clamp(0, classes - 1)]
    return own.to(dtype)


class MarginSoftmaxFunction(torch.autograd.Function):
    """The loss of each sample, [B]. `options` are those of csrc/margin.h."""

    @staticmethod
    def forward(
        ctx, features, weight, labels, cosine_margin, angular_margin, options, keep, dtype, backend
    ):
        lse, targets, inverse_norms, products = forward(
            features, weight, labels, cosine_margin, angular_margin, *options, keep, dtype, backend
        )
        ctx.save_for_backward(
            features, weight, labels, cosine_margin, angular_margin, lse, targets, inverse_norms,
            products,
        )  # fmt: skip
        ctx.options, ctx.dtype, ctx.backend = options, dtype, backend
        return torch.where(labels == options[-1], 0, lse - targets[0])

    @staticmethod
    def backward(ctx, grad_losses):
        features, weight, labels, cosine_margin, angular_margin, *state = ctx.saved_tensors
        wanted = wanted_gradients(ctx, 2)
        if torch.is_grad_enabled():
            scale, multiplier, normalize_features, normalize_weight, _, _, ignored = ctx.options
            # The reference would follow a label out of range.
            invalid = (labels != ignored) & ((labels < 0) | (labels >= len(weight)))
            valid = torch.where(invalid, ignored, labels)

            def again(features: Tensor, weight: Tensor) -> Tensor:
                return reference.margin_softmax_loss(
                    features, weight, valid, scale=scale, cosine_margin=cosine_margin[:, None],
                    angular_margin=angular_margin[:, None], angular_multiplier=multiplier,
                    normalize_features=normalize_features, normalize_weight=normalize_weight,
                    reduction="none", ignore_index=ignored,
                )  # fmt: skip

            grads = gradients_through_reference(again, (features, weight), wanted, grad_losses)
            if wanted[0]:
                grads[0] = torch.where(invalid[:, None], torch.nan, grads[0])
        else:
            grads = backward(
                grad_losses, features, weight, labels, *state, *ctx.options, *wanted, ctx.dtype,
                ctx.backend,
            )  # fmt: skip
            grads = [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
        return *grads, None, None, None, None, None, None, None
