from __future__ import annotations

import torch
from torch import Tensor

from facelt_ext import _backend, _native
from facelt_ext._autocast import autocast_off
from facelt_ext._checks import (
    FLOATING,
    check_choice,
    check_class_range,
    check_flag,
    check_ignore_index,
    check_integers,
    check_matrix,
    check_number,
    check_tensor,
)
from facelt_ext._operators import operator
from facelt_ext.functional._reductions import REDUCTIONS
from facelt_ext.functional._second_order import gradient_through_reference
from facelt_ext.reference.cluster_margin import sample_losses, weighted
from facelt_ext.reference.margin_softmax import reduced
from facelt_ext.types import compute_dtype

# With more clusters than this the products are torch's, with fewer they are made between the rest.
FEW_CLUSTERS = 32
# As csrc/cluster_margin.h has them.
WHOLE, BEFORE_PRODUCTS, AFTER_PRODUCTS = range(3)


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
    ignore_index: int | None = -100,
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
        cluster_index: [B], the cluster of each sample, integers in [0, M) or `ignore_index`.
        cluster_class: [M], the class of each cluster, any integers.
        between_margin: a1, to clusters of other classes.
        within_margin: a2, to clusters of the same class.
        sample_weight: [B], factors of the losses; no gradient goes to them.
        normalize_centroids: divides centroids by their norms; a centroid of zeros stays.
        reduction: "mean" over the samples that take part (of none it is 0), "sum" or "none".
        ignore_index: samples with this cluster_index take no part; their loss and their gradient
            are 0, whatever their features are. None: no number is ignored.

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
        ignore_index=ignore_index,
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
    ignore_index: int | None,
) -> tuple[Tensor, Tensor]:
    """The loss, and of each sample the unweighted one, [B], without a gradient."""
    features = check_matrix(features, "features")
    cluster_index = check_integers(cluster_index, "cluster_index", features, "features")
    cluster_class = check_integers(cluster_class, "cluster_class")
    if cluster_class.ndim != 1:
        raise ValueError(
            f"cluster_class: expected shape [clusters], got {list(cluster_class.shape)}"
        )
    if cluster_class.device != features.device:
        raise ValueError(
            f"cluster_class: expected device {features.device}, where features is, got "
            f"{cluster_class.device}"
        )
    batch = features.shape[0]
    if cluster_class.shape[0] == 0 and batch > 0:
        raise ValueError(
            f"cluster_class: expected at least one cluster for {batch} samples, got none"
        )
    dtype = compute_dtype(features.dtype)
    between_margin = check_number(between_margin, "between_margin", dtype)
    within_margin = check_number(within_margin, "within_margin", dtype)
    normalize_centroids = check_flag(normalize_centroids, "normalize_centroids")
    reduction = check_choice(reduction, "reduction", REDUCTIONS)
    if sample_weight is not None:
        sample_weight = _check_sample_weight(sample_weight, features)
    ignore_index = check_ignore_index(ignore_index)
    backend = _backend.of_call("cluster_margin_loss", features, traceable=True)
    if backend == "reference" or _backend.debugging():
        check_class_range(cluster_index, "cluster_index", cluster_class.shape[0], ignore_index)
    margins = float(between_margin), float(within_margin), normalize_centroids
    if backend == "reference":
        with autocast_off(features.device.type):
            losses, taking_part = sample_losses(
                features, cluster_index, cluster_class, *margins, ignore_index
            )
            loss = reduced(weighted(losses, sample_weight, taking_part), taking_part, reduction)
            return loss, losses.detach()
    if features.dtype != dtype:
        features = features.to(dtype)
    if sample_weight is not None:
        sample_weight = sample_weight.to(dtype)
    return ClusterMarginFunction.apply(
        features, cluster_index, cluster_class, sample_weight,
        (*margins, reduction, ignore_index, backend),
    )  # fmt: skip


def _check_sample_weight(sample_weight: Tensor, features: Tensor) -> Tensor:
    sample_weight = check_tensor(sample_weight, "sample_weight")
    if sample_weight.dtype not in FLOATING:
        raise TypeError(f"sample_weight: expected a floating dtype, got {sample_weight.dtype}")
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
    return sample_weight


class ClusterMarginFunction(torch.autograd.Function):
    """The loss and each sample's unweighted one, for features and weights in the compute dtype."""

    @staticmethod
    def forward(ctx, features, cluster_index, cluster_class, sample_weight, options):
        loss, losses, state = _forward(
            features, cluster_index, cluster_class, sample_weight, *options
        )
        ctx.save_for_backward(features, cluster_index, cluster_class, sample_weight, state)
        ctx.options = options
        ctx.mark_non_differentiable(losses)
        return loss, losses

    @staticmethod
    def backward(ctx, grad_loss, _):
        features, cluster_index, cluster_class, sample_weight, state = ctx.saved_tensors
        if torch.is_grad_enabled():
            *margins, reduction, ignore_index, _ = ctx.options

            def again(x: Tensor) -> Tensor:
                losses, taking_part = sample_losses(
                    x, cluster_index, cluster_class, *margins, ignore_index
                )
                return reduced(weighted(losses, sample_weight, taking_part), taking_part, reduction)

            grad = gradient_through_reference(again, features, grad_loss)
        else:
            grad = _backward(grad_loss, features, cluster_index, state, *ctx.options)
        return grad, None, None, None, None


OPTIONS = (
    "float between_margin, float within_margin, bool normalize, str reduction,"
    " SymInt? ignore_index, str backend"
)


def _native_options(
    between: float, within: float, normalize: bool, reduction: str, ignore_index: int | None
) -> tuple:
    return between, within, normalize, REDUCTIONS.index(reduction), ignore_index


def _products(state: Tensor, features: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Of the state, those of samples and clusters (or the gradient by them), and the centroids."""
    batch, dimensions = features.shape
    centroids = state[batch * clusters : batch * clusters + clusters * dimensions]
    return state[: batch * clusters].view(batch, clusters), centroids.view(clusters, dimensions)


def _without_ignored(
    gradient: Tensor,
    features: Tensor,
    cluster_index: Tensor,
    taking_part: Tensor,
    ignore_index: int | None,
) -> tuple[Tensor, Tensor]:
    """Both with rows of zeros for ignored samples: 0 times what is not finite would be NaN."""
    if ignore_index is None or (features.is_cpu and taking_part == len(features)):
        return gradient, features
    ignored = (cluster_index == ignore_index)[:, None]
    return gradient.masked_fill(ignored, 0), features.masked_fill(ignored, 0)


def _forward_fake(
    features, cluster_index, cluster_class, sample_weight, between, within, normalize, reduction,
    ignore_index, backend,
):  # fmt: skip
    batch, dimensions = features.shape
    clusters = cluster_class.shape[0]
    # The state is laid out in csrc/cluster_margin.h.
    return (
        features.new_empty(batch if reduction == "none" else ()),
        features.new_empty(batch),
        features.new_empty((batch + dimensions + 2) * clusters + 2),
    )


@operator(
    "cluster_margin_forward(Tensor features, Tensor cluster_index, Tensor cluster_class,"
    f" Tensor? sample_weight, {OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _forward_fake,
)
def _forward(features, cluster_index, cluster_class, sample_weight, *rest):
    """loss [] or [B], unweighted losses [B], state."""
    *options, backend = rest
    features = features.contiguous()
    if sample_weight is not None:
        sample_weight = sample_weight.contiguous()
    outputs = _forward_fake(features, cluster_index, cluster_class, sample_weight, *rest)
    args = (
        features, cluster_index.contiguous(), cluster_class.contiguous(), sample_weight,
        _native_options(*options),
    )  # fmt: skip
    name = "cluster_margin_forward"
    if len(cluster_class) <= FEW_CLUSTERS:
        _native.run(backend, features, name, *args, WHOLE, *outputs)
        return outputs
    _native.run(backend, features, name, *args, BEFORE_PRODUCTS, *outputs)
    products, centroids = _products(outputs[2], features, len(cluster_class))
    torch.mm(features, centroids.t(), out=products)
    _native.run(backend, features, name, *args, AFTER_PRODUCTS, *outputs)
    return outputs


def _backward_fake(
    grad_loss, features, cluster_index, state, between, within, normalize, reduction,
    ignore_index, backend,
):  # fmt: skip
    return torch.empty_like(features, memory_format=torch.contiguous_format)


@operator(
    "cluster_margin_backward(Tensor grad_loss, Tensor features, Tensor cluster_index,"
    f" Tensor state, {OPTIONS}) -> Tensor",
    _backward_fake,
)
def _backward(grad_loss, features, cluster_index, state, *rest):
    *options, backend = rest
    features, grad_loss = features.contiguous(), grad_loss.contiguous()
    batch, dimensions = features.shape
    # The state is laid out in csrc/cluster_margin.h.
    clusters = (len(state) - 2) // (batch + dimensions + 2)
    grad_centroids = features.new_empty(clusters, dimensions)
    grad_features = torch.empty_like(features)
    part = WHOLE
    if clusters > FEW_CLUSTERS:
        part = AFTER_PRODUCTS
        gradient, centroids = _products(state, features, clusters)
        gradient = gradient * grad_loss.view(-1, 1)
        gradient, rows = _without_ignored(gradient, features, cluster_index, state[-1], options[-1])
        torch.mm(gradient.t(), rows, out=grad_centroids)
        torch.mm(gradient, centroids, out=grad_features)
    _native.run(
        backend, features, "cluster_margin_backward", grad_loss, features,
        cluster_index.contiguous(), _native_options(*options), part, state, grad_centroids,
        grad_features,
    )  # fmt: skip
    return grad_features
