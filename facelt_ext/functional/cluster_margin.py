from __future__ import annotations

import torch
from torch import Tensor

from facelt_ext import _backend, _native
from facelt_ext._checks import (
    check_choice,
    check_class_range,
    check_matrix,
    check_number,
    checked_integers,
)
from facelt_ext._operators import operator
from facelt_ext.functional._products import autocast_off
from facelt_ext.functional._second_order import gradient_through_reference
from facelt_ext.reference.cluster_margin import sample_losses
from facelt_ext.types import compute_dtype

# With more clusters than this the products are torch's, with fewer they are made between the rest.
FEW_CLUSTERS = 32


def cluster_margin_loss(
    features: Tensor,
    cluster_index: Tensor,
    cluster_class: Tensor,
    *,
    between_margin: float,
    within_margin: float,
    sample_weight: Tensor | None = None,
    normalize_centroids: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """The cluster-based large margin local embedding loss (CLMLE, Huang et al., TPAMI 2020, eq. 9).

    A sample f of cluster m, with the clusters' centroids mu in the batch, has the loss

        [between_margin - f.mu_m + log sum_k exp(f.mu_k)]_+  over the clusters k of other classes
      + [within_margin - f.mu_m + log sum_k exp(f.mu_k)]_+   over the other clusters of its class

    A hinge without clusters to sum over is 0, and so is its gradient at 0. Clusters without samples
    are left out. Gradients flow through the centroids.

    Args:
        features: [B, D], float64, float32, bfloat16 or float16, as a rule of length 1, which is
            left to the caller.
        cluster_index: [B], the cluster of each sample, integers in [0, M).
        cluster_class: [M], the class of each cluster, any integers.
        between_margin: a1, to clusters of other classes.
        within_margin: a2, to clusters of the same class.
        sample_weight: [B], factors of the losses; no gradient goes to them.
        normalize_centroids: divides centroids by their norms; a centroid of zeros stays.
        reduction: "mean" over the samples (of none it is 0), "sum" or "none".

    All is reckoned in float32 (float64 for float64), halves too.

    Returns:
        The loss, [] or [B]: float64 for float64 features, float32 otherwise. There is no host
        synchronisation on CUDA: there a cluster_index out of range makes its sample's loss and
        feature gradient NaN; `facelt_ext.debug_checks(True)` makes it a ValueError, as on the CPU.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range.
    """
    return cluster_margin_losses(
        features,
        cluster_index,
        cluster_class,
        between_margin=between_margin,
        within_margin=within_margin,
        sample_weight=sample_weight,
        normalize_centroids=normalize_centroids,
        reduction=reduction,
    )[0]


def cluster_margin_losses(
    features: Tensor,
    cluster_index: Tensor,
    cluster_class: Tensor,
    *,
    between_margin: float,
    within_margin: float,
    sample_weight: Tensor | None,
    normalize_centroids: bool,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """The loss, and of each sample the unweighted one, [B], without a gradient."""
    check_matrix(features, "features")
    cluster_index = checked_integers(cluster_index, "cluster_index", features, "features")
    if not isinstance(cluster_class, Tensor):
        raise TypeError(f"cluster_class: expected a tensor, got {type(cluster_class).__name__}")
    if cluster_class.ndim != 1:
        raise ValueError(
            f"cluster_class: expected shape [clusters], got {list(cluster_class.shape)}"
        )
    cluster_class = checked_integers(cluster_class, "cluster_class", cluster_class, "cluster_class")
    if cluster_class.device != features.device:
        raise ValueError(
            f"cluster_class: expected device {features.device}, where features is, got "
            f"{cluster_class.device}"
        )
    if len(cluster_class) == 0 and len(features) > 0:
        raise ValueError(
            f"cluster_class: expected at least one cluster for {len(features)} samples, got none"
        )
    dtype = compute_dtype(features.dtype)
    check_number(between_margin, "between_margin", dtype)
    check_number(within_margin, "within_margin", dtype)
    check_choice(reduction, "reduction", ("none", "mean", "sum"))
    if sample_weight is not None:
        _check_sample_weight(sample_weight, features)
    backend = _backend.current()
    if backend == "reference" or _backend.debugging():
        check_class_range(cluster_index, "cluster_index", len(cluster_class), None)
    margins = float(between_margin), float(within_margin), bool(normalize_centroids)
    with autocast_off(features.device.type):
        if backend == "reference":
            losses = sample_losses(features, cluster_index, cluster_class, *margins)
            return _reduced(losses, sample_weight, reduction), losses.detach()
        return ClusterMarginFunction.apply(
            features.to(dtype), cluster_index, cluster_class, sample_weight, *margins, reduction,
            backend,
        )  # fmt: skip


def _reduced(losses: Tensor, sample_weight: Tensor | None, reduction: str) -> Tensor:
    if sample_weight is not None:
        losses = sample_weight.to(losses.dtype) * losses
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / max(len(losses), 1)


def _factors(grad_loss: Tensor, batch: int, sample_weight: Tensor | None, reduction: str) -> Tensor:
    """The gradient by each sample's unweighted loss, [B]."""
    if reduction == "mean":
        grad_loss = grad_loss / max(batch, 1)
    if sample_weight is not None:
        return grad_loss * sample_weight.to(grad_loss.dtype)
    return grad_loss.expand(batch)


def _check_sample_weight(sample_weight: Tensor, features: Tensor) -> None:
    if not isinstance(sample_weight, Tensor) or not sample_weight.is_floating_point():
        got = getattr(sample_weight, "dtype", type(sample_weight).__name__)
        raise TypeError(f"sample_weight: expected a floating tensor, got {got}")
    wanted = [features.shape[0]]
    if list(sample_weight.shape) != wanted or sample_weight.device != features.device:
        raise ValueError(
            f"sample_weight: expected shape {wanted} on {features.device}, one for each row of "
            f"features, got {list(sample_weight.shape)} on {sample_weight.device}"
        )
    if sample_weight.requires_grad:
        raise ValueError(
            "sample_weight: no gradient goes to weights; expected sample_weight.detach()"
        )


class ClusterMarginFunction(torch.autograd.Function):
    """The loss and each sample's unweighted one, for features in the compute dtype."""

    @staticmethod
    def forward(
        ctx, features, cluster_index, cluster_class, sample_weight, between_margin, within_margin,
        normalize, reduction, backend,
    ):  # fmt: skip
        losses, *state = _forward(
            features, cluster_index, cluster_class, between_margin, within_margin, normalize,
            backend,
        )  # fmt: skip
        ctx.save_for_backward(features, cluster_index, cluster_class, sample_weight, *state)
        ctx.margins = between_margin, within_margin, normalize
        ctx.reduction, ctx.backend = reduction, backend
        ctx.mark_non_differentiable(losses)
        loss = _reduced(losses, sample_weight, reduction)
        return loss.clone() if loss is losses else loss, losses

    @staticmethod
    def backward(ctx, grad_loss, _):
        features, cluster_index, cluster_class, sample_weight, *state = ctx.saved_tensors
        factors = _factors(grad_loss, len(features), sample_weight, ctx.reduction)
        if torch.is_grad_enabled():

            def again(x: Tensor) -> Tensor:
                return sample_losses(x, cluster_index, cluster_class, *ctx.margins)

            with autocast_off(features.device.type):
                grad = gradient_through_reference(again, features, factors)
        else:
            normalize = ctx.margins[2]
            grad = _backward(factors, features, cluster_index, *state, normalize, ctx.backend)
        return grad, *[None] * 8


def _forward_fake(features, cluster_index, cluster_class, between, within, normalize, backend):
    batch, dimensions = features.shape
    clusters = cluster_class.shape[0]
    return (
        features.new_empty(batch),
        features.new_empty(batch, clusters),
        features.new_empty(clusters, dimensions),
        features.new_empty(clusters),
        cluster_class.new_empty(clusters),
    )


@operator(
    "cluster_margin_forward(Tensor features, Tensor cluster_index, Tensor cluster_class,"
    " float between_margin, float within_margin, bool normalize, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward_fake,
)
def _forward(features, cluster_index, cluster_class, between, within, normalize, backend):
    """losses [B], their gradient by the products with the centroids [B, M], centroids [M, D], 1 /
    norms of the means [M], samples [M]."""
    features, cluster_index = features.contiguous(), cluster_index.contiguous()
    outputs = _forward_fake(
        features, cluster_index, cluster_class, between, within, normalize, backend
    )
    losses, gradient, centroids, inverse_norms, counts = outputs
    _native.run(
        backend, features, "cluster_centroids", features, cluster_index, normalize, centroids,
        inverse_norms, counts,
    )  # fmt: skip
    given = len(centroids) > FEW_CLUSTERS
    if given:
        torch.mm(features, centroids.t(), out=gradient)
    _native.run(
        backend, features, "cluster_hinges", features, cluster_index, cluster_class.contiguous(),
        centroids, counts, between, within, given, losses, gradient,
    )  # fmt: skip
    return outputs


def _backward_fake(
    grad_losses, features, cluster_index, gradient, centroids, inverse_norms, counts, normalize,
    backend,
):  # fmt: skip
    return torch.empty_like(features, memory_format=torch.contiguous_format)


@operator(
    "cluster_margin_backward(Tensor grad_losses, Tensor features, Tensor cluster_index,"
    " Tensor gradient, Tensor centroids, Tensor inverse_norms, Tensor counts, bool normalize,"
    " str backend) -> Tensor",
    _backward_fake,
)
def _backward(
    grad_losses, features, cluster_index, gradient, centroids, inverse_norms, counts, normalize,
    backend,
):  # fmt: skip
    features, cluster_index = features.contiguous(), cluster_index.contiguous()
    factors = grad_losses.contiguous()
    shares, grad_features = torch.empty_like(centroids), torch.empty_like(features)
    given = len(centroids) > FEW_CLUSTERS
    if given:
        torch.mm(gradient.t(), factors[:, None] * features, out=shares)
        torch.mm(gradient, centroids, out=grad_features)
    _native.run(
        backend, features, "cluster_centroid_gradient", features, factors, gradient, centroids,
        inverse_norms, counts, normalize, given, shares,
    )  # fmt: skip
    _native.run(
        backend, features, "cluster_feature_gradient", factors, cluster_index, gradient, centroids,
        shares, given, grad_features,
    )  # fmt: skip
    return grad_features
