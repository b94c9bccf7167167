"""Losses that the package's own are compared with, or that are made of several of them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from facelt_ext import CosFaceLoss, RangeLoss


class SoftmaxLoss(nn.Module):
    """Cross-entropy over the logits of a linear classifier."""

    def __init__(self, num_classes: int, embedding_size: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(embedding_size, num_classes)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.classifier(features), labels)


class SoftmaxRangeLoss(SoftmaxLoss):
    """Softmax with Range Loss on the features as they are."""

    def __init__(self, num_classes: int, embedding_size: int, **range_settings: float) -> None:
        super().__init__(num_classes, embedding_size)
        self.range_loss = RangeLoss(**range_settings)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        return super().forward(features, labels) + self.range_loss(features, labels)


class CosFaceRangeLoss(CosFaceLoss):
    """CosFace with Range Loss on the normalised features, whose norms CosFace leaves free."""

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float,
        scale: float,
        *,
        range_margin: float,
        alpha: float,
        beta: float,
    ) -> None:
        super().__init__(num_classes, embedding_size, margin, scale)
        self.range_loss = RangeLoss(margin=range_margin, alpha=alpha, beta=beta)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        range_term = self.range_loss(F.normalize(features), labels)
        return super().forward(features, labels) + range_term


class SumLoss(nn.Module):
    """The sum of losses that take the same features and labels."""

    def __init__(self, *losses: nn.Module) -> None:
        super().__init__()
        self.losses = nn.ModuleList(losses)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        return sum(loss(features, labels) for loss in self.losses)
