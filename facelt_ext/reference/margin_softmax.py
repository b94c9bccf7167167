from __future__ import annotations

import math

import torch
from torch import Tensor

from facelt_ext.types import compute_dtype

LEAST_SINE = 1e-4


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
) -> Tensor:
    """See `facelt_ext.functional.margin_softmax_loss`."""
    dtype = compute_dtype(torch.promote_types(features.dtype, weight.dtype))
    taking_part = labels != ignore_index
    classes = torch.where(taking_part, labels, 0)
    features = torch.where(taking_part[:, None], features.to(dtype), 0)
    weight = weight.to(dtype)
    directions, norms = unit_rows(features)
    if normalize_features:
        norms = torch.ones_like(norms)
    if normalize_weight:
        rows = unit_rows(weight)[0]
        margin = margins_of(cosine_margin, classes, dtype)
        angles = margins_of(angular_margin, classes, dtype)
        target = (
            scale * norms * (psi(directions, rows[classes], angles, angular_multiplier) - margin)
        )
        logits = scale * norms[:, None] * (directions @ rows.t())
        logits = logits.scatter(1, classes[:, None], target[:, None])
    else:
        logits = scale * ((directions if normalize_features else features) @ weight.t())
    losses = torch.nn.functional.cross_entropy(logits, classes, reduction="none")
    losses = torch.where(taking_part, losses, 0)
    return reduced(losses, taking_part, reduction)


def reduced(losses: Tensor, taking_part: Tensor, reduction: str) -> Tensor:
    """The mean is over the samples that take part; that of none is 0."""
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / taking_part.sum().clamp(min=1)


def unit_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row divided by its norm, and the norms; rows of zeros stay, with gradient 0.

    The largest number is divided out first, so that squares neither overflow nor vanish.
    """
    largest = x.detach().abs().amax(1, keepdim=True)
    zero = largest < torch.finfo(x.dtype).tiny
    y = torch.where(zero, 0, x / torch.where(zero, 1, largest))
    norms = torch.where(zero, 1, y.square().sum(1, keepdim=True)).sqrt()
    return y / norms, torch.where(zero, 0, largest * norms)[:, 0]


def margins_of(margin: float | Tensor, classes: Tensor, dtype: torch.dtype) -> Tensor:
    """The margin of each sample, [B]: from a number, one per class [N] or one per sample [B, 1]."""
    if not isinstance(margin, Tensor):
        return torch.full(classes.shape, margin, dtype=dtype, device=classes.device)
    return (margin[:, 0] if margin.ndim == 2 else margin[classes]).to(dtype)


def psi(u: Tensor, v: Tensor, margin: Tensor, multiplier: int) -> Tensor:
    """(-1)^j cos(phi) - 2j with phi = multiplier * theta + margin, and theta between u and v.

    j is the number of whole turns by pi that are left behind: SphereFace's monotone extension. Rows
    of zeros are at a right angle to all others. Below LEAST_SINE the derivative of the sine by the
    cosine is kept at what it is there.
    """
    square = (u - v).square().sum(1) * (u + v).square().sum(1) / 4
    square = torch.where((u == 0).all(1) | (v == 0).all(1), 1, square)
    steep = square > LEAST_SINE**2
    flat_sine = square.detach().sqrt() + (square - square.detach()) / (2 * LEAST_SINE)
    sine = torch.where(steep, torch.where(steep, square, 1).sqrt(), flat_sine)
    cosine = (u * v).sum(1)
    theta = torch.atan2(sine, cosine).detach()
    j = torch.clamp(torch.ceil((multiplier * theta + margin) / math.pi) - 1, min=0)
    # cos(k theta) and sin(k theta) / sin(theta), by their recurrences.
    cosines, ratios = [torch.ones_like(cosine), cosine], [torch.zeros_like(cosine), cosine**0]
    for _ in range(multiplier - 1):
        cosines.append(2 * cosine * cosines[-1] - cosines[-2])
        ratios.append(2 * cosine * ratios[-1] - ratios[-2])
    cosine_of_phi = margin.cos() * cosines[-1] - margin.sin() * ratios[-1] * sine
    return (1 - 2 * (j % 2)) * cosine_of_phi - 2 * j
