"""The methods that are compared: what turns a network's features into a loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from facelt_ext import (
    ArcFaceLoss,
    CosFaceLoss,
    DomainBalancingLoss,
    RangeLoss,
    ResidualBalancingModule,
)

from .model import EMBEDDING_SIZE, FaceNet


@dataclass(frozen=True)
class Method:
    """A way to train the network.

    Attributes:
        title: its name in the report.
        paper: where it comes from.
        make_loss: called with the number of classes, the size of the features and ``settings``;
            gives a module that is called with features and labels.
        settings: its hyper-parameters.
        balanced: the features pass through a residual balancing module, whose gate the loss gets.
    """

    title: str
    paper: str
    make_loss: Callable[..., nn.Module]
    settings: dict[str, float | str] = field(default_factory=dict)
    balanced: bool = False

    def build(self, num_classes: int) -> tuple[FaceNet, nn.Module]:
        """The network and the loss, with their parameters drawn in the same order as all others."""
        network = FaceNet()
        if self.balanced:
            network.balancing = ResidualBalancingModule(EMBEDDING_SIZE)
        return network, self.make_loss(num_classes, EMBEDDING_SIZE, **self.settings)


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


METHODS = {
    "softmax": Method("softmax", "", SoftmaxLoss),
    "softmax+range": Method(
        "softmax + Range Loss",
        "Zhang et al., arXiv:1611.08976",
        SoftmaxRangeLoss,
        {"alpha": 1e-3, "beta": 1e-3, "margin": 300.0},
    ),
    "cosface": Method(
        "CosFace", "Wang et al., arXiv:1801.09414", CosFaceLoss, {"margin": 0.2, "scale": 16.0}
    ),
    "arcface": Method(
        "ArcFace", "Deng et al., arXiv:1801.07698", ArcFaceLoss, {"margin": 0.2, "scale": 16.0}
    ),
    "cosface+range": Method(
        "CosFace + Range Loss",
        "",
        CosFaceRangeLoss,
        {
            "margin": 0.2,
            "scale": 16.0,
            "alpha": 0.03,
            "beta": 0.3,
            "range_margin": 1.0,
        },
    ),
    "domain-balancing": Method(
        "Domain Balancing",
        "Cao et al., CVPR 2020",
        DomainBalancingLoss,
        {
            "margin": 0.2,
            "scale": 16.0,
            "k": 5,
            "epsilon": "auto",
            "indicator_scale": 4.0,
            "rbm_weight": 0.01,
        },
        balanced=True,
    ),
}
