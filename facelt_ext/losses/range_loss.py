from __future__ import annotations

from torch import Tensor, nn

from facelt_ext import functional
from facelt_ext._checks import check_ignore_index


class RangeLoss(nn.Module):
    """Range Loss for long-tailed data (Zhang et al., arXiv:1611.08976), as a module.

    To be added to a classification loss: `softmax(logits, labels) + weight * range_loss(features,
    labels)`, over batches that hold several images of several identities (see
    `facelt_ext.samplers.PKSampler`). The arguments are those of `facelt_ext.functional.range_loss`,
    which says what each does; all may be changed between steps.
    """

    def __init__(
        self,
        k: int = 2,
        margin: float = 2e4,
        alpha: float = 1e-5,
        beta: float = 1e-4,
        squared: bool = True,
        ignore_index: int | None = -100,
    ) -> None:
        super().__init__()
        self.k = k
        self.margin = margin
        self.alpha = alpha
        self.beta = beta
        self.squared = squared
        self.ignore_index = check_ignore_index(ignore_index)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """features [B, D] and integer labels [B] -> the loss, [].

        Samples labeled `ignore_index` take no part, and their gradient is 0.
        """
        return functional.range_loss(
            features,
            labels,
            k=self.k,
            margin=self.margin,
            alpha=self.alpha,
            beta=self.beta,
            squared=self.squared,
            ignore_index=self.ignore_index,
        )

    def extra_repr(self) -> str:
        return (
            f"k={self.k}, margin={self.margin}, alpha={self.alpha}, beta={self.beta}, "
            f"squared={self.squared}, ignore_index={self.ignore_index}"
        )
