from __future__ import annotations

import torch
from torch import Tensor, nn

from facelt_ext import functional
from facelt_ext._checks import check_count, check_flag, check_ignore_index, check_number
from facelt_ext.losses._arguments import check_indices_tuple


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
        self.k = check_count(k, "k")
        self.margin = check_number(margin, "margin", torch.float64)
        self.alpha = check_number(alpha, "alpha", torch.float64)
        self.beta = check_number(beta, "beta", torch.float64)
        self.squared = check_flag(squared, "squared")
        self.ignore_index = check_ignore_index(ignore_index)

    def forward(self, features: Tensor, labels: Tensor, indices_tuple: None = None) -> Tensor:
        """features [B, D] and integer labels [B] -> the loss, [].

        Samples labeled `ignore_index` take no part, and their gradient is 0.
        """
        check_indices_tuple(indices_tuple)
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
