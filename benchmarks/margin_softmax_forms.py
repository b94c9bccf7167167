"""CosFace as users have it, with the margin and the scale of its paper; what ours is compared with.

`linear_cross_entropy` computes no margin: it is there for its time and its memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pytorch_metric_learning.losses import CosFaceLoss
from torch import Tensor, nn

from facelt_ext import functional

SCALE, MARGIN = 64.0, 0.35
CHUNK = 64


def ours(features: Tensor, weight: Tensor, labels: Tensor, workspace: str = "auto") -> Tensor:
    return functional.margin_softmax_loss(
        features, weight, labels, scale=SCALE, cosine_margin=MARGIN, workspace=workspace
    )


def ours_high(features: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return ours(features, weight, labels, "high")


def ours_low(features: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return ours(features, weight, labels, "low")


def one_hot(features: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """As most public face code writes it."""
    cosines = F.linear(F.normalize(features), F.normalize(weight))
    targets = torch.zeros_like(cosines).scatter_(1, labels[:, None], 1.0)
    logits = targets * (cosines - MARGIN) + (1.0 - targets) * cosines
    return F.cross_entropy(SCALE * logits, labels)


def indexed(features: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The margin taken off the targets alone, as InsightFace does."""
    cosines = F.linear(F.normalize(features), F.normalize(weight))
    cosines[torch.arange(len(labels), device=labels.device), labels] -= MARGIN
    return F.cross_entropy(SCALE * cosines, labels)


def linear_cross_entropy(
    features: Tensor, weight: Tensor, labels: Tensor, chunk: int | None = None
) -> Tensor:
    options = chunk and torch.nn.LinearCrossEntropyOptions(
        batch_chunk_size=chunk, chunking_method=None
    )
    rows = F.normalize(weight)
    return F.linear_cross_entropy(SCALE * F.normalize(features), rows, labels, options=options)


def chunked_linear_cross_entropy(features: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """In chunks of samples; left to itself it takes them singly here, in 90 times the floor."""
    return linear_cross_entropy(features, weight, labels, CHUNK)


def metric_learning(weight: Tensor) -> CosFaceLoss:
    """pytorch-metric-learning's loss with this weight, which it holds transposed, as its `W`."""
    loss = CosFaceLoss(*weight.shape, margin=MARGIN, scale=SCALE)
    loss.W = nn.Parameter(weight.detach().t().contiguous())
    return loss
