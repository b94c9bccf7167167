from __future__ import annotations

import torch
from torch import Tensor, nn

from facelt_ext import functional
from facelt_ext._checks import check_count
from facelt_ext.reference.margin_softmax import unit_rows
from facelt_ext.types import compute_dtype


class MarginSoftmaxLoss(nn.Module):
    """A classifier over normalised rows with its loss; what CosFace, ArcFace and SphereFace share.

    Args:
        num_classes: N.
        embedding_size: D.
        margin: a number, or one per class, [N].
        scale: of the cosines.
        reduction, ignore_index, workspace: see `facelt_ext.functional.margin_softmax_loss`.
        device, dtype: of the weight.

    Attributes:
        weight: the parameter [N, D], a row per class, drawn from a normal distribution with
            standard deviation 0.01. The rows' norms have no influence on the loss.

    All other attributes may be changed between steps.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float | Tensor,
        scale: float,
        *,
        reduction: str = "mean",
        ignore_index: int = -100,
        workspace: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count(num_classes, "num_classes")
        check_count(embedding_size, "embedding_size")
        self.margin = margin
        self.scale = scale
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.workspace = workspace
        self.weight = nn.Parameter(
            torch.empty(num_classes, embedding_size, device=device, dtype=dtype)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.01)

    def logits(self, features: Tensor) -> Tensor:
        """scale * cosine of each feature [B, D] with each class, [B, N], without a margin."""
        return self.scale * _unit_rows(features) @ self._unit_weight(features.dtype).t()

    def _unit_weight(self, dtype: torch.dtype) -> Tensor:
        return _unit_rows(self.weight).to(dtype)

    def _margin(self) -> float | Tensor:
        """The margin where the weight is; moved there once."""
        if isinstance(self.margin, Tensor) and self.margin.device != self.weight.device:
            self.margin = self.margin.to(self.weight.device)
        return self.margin

    def _loss(self, features: Tensor, labels: Tensor, **margins: object) -> Tensor:
        return functional.margin_softmax_loss(
            features,
            self.weight,
            labels,
            scale=self.scale,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            workspace=self.workspace,
            **margins,
        )

    def extra_repr(self) -> str:
        classes, dimensions = self.weight.shape
        margin = "per class" if isinstance(self.margin, Tensor) else self.margin
        return (
            f"num_classes={classes}, embedding_size={dimensions}, margin={margin}, "
            f"scale={self.scale}"
        )


def _unit_rows(x: Tensor) -> Tensor:
    return unit_rows(x.to(compute_dtype(x.dtype)))[0].to(x.dtype)


class CosFaceLoss(MarginSoftmaxLoss):
    """CosFace (Wang et al., arXiv:1801.09414, eq. 4): the margin is taken off the target's cosine.

    Args:
        margin: a number, or one per class, [N].
        num_classes, embedding_size, scale, options: see `MarginSoftmaxLoss`.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float | Tensor = 0.35,
        scale: float = 64.0,
        **options: object,
    ) -> None:
        super().__init__(num_classes, embedding_size, margin, scale, **options)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """features [B, D] and integer labels [B] -> the loss."""
        return self._loss(features, labels, cosine_margin=self._margin())


class ArcFaceLoss(MarginSoftmaxLoss):
    """ArcFace (Deng et al., arXiv:1801.07698, eq. 3): the margin is added to the target's angle.

    The gradient is the loss's derivative also where the angle and the margin pass pi, and where the
    public implementations take a straight-through one.

    Args:
        margin: in radians, where pytorch-metric-learning takes degrees; a number or one per class,
            [N].
        num_classes, embedding_size, scale, options: see `MarginSoftmaxLoss`.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float | Tensor = 0.5,
        scale: float = 64.0,
        **options: object,
    ) -> None:
        super().__init__(num_classes, embedding_size, margin, scale, **options)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """features [B, D] and integer labels [B] -> the loss."""
        return self._loss(features, labels, angular_margin=self._margin())


class SphereFaceLoss(MarginSoftmaxLoss):
    """SphereFace (Liu et al., arXiv:1704.08063, eq. 7): the target's angle is multiplied.

    Features are not normalised: each sample's logits are multiplied with its feature's norm.

    Args:
        margin: what the angle is multiplied with, an integer of at least 1.
        num_classes, embedding_size, scale, options: see `MarginSoftmaxLoss`.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: int = 4,
        scale: float = 1.0,
        **options: object,
    ) -> None:
        super().__init__(num_classes, embedding_size, margin, scale, **options)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """features [B, D] and integer labels [B] -> the loss."""
        return self._loss(
            features, labels, angular_multiplier=self.margin, normalize_features=False
        )

    def logits(self, features: Tensor) -> Tensor:
        """scale * |feature| * cosine with each class, [B, N], without a margin."""
        return self.scale * features @ self._unit_weight(features.dtype).t()


def convert_state_dict(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weight of another library's head, as `load_state_dict` of a head here takes it.

    Args:
        state_dict: of pytorch-metric-learning (`W` [D, N]) or insightface (`weight` [N, D] of a
            partial-FC head, `kernel` [D, N] of the older ones), with or without a prefix.

    Returns:
        {"weight": [N, D]}.

    Raises:
        ValueError: no such entry, or more than one.
    """
    found = [
        tensor if name.split(".")[-1] == "weight" else tensor.t()
        for name, tensor in state_dict.items()
        if name.split(".")[-1] in ("weight", "W", "kernel") and tensor.ndim == 2
    ]
    if len(found) != 1:
        raise ValueError(
            "state_dict: expected one matrix named weight, W or kernel, got the entries "
            f"{', '.join(state_dict) or 'none'}"
        )
    return {"weight": found[0].contiguous()}
