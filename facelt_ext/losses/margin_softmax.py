from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from facelt_ext import functional
from facelt_ext._checks import (
    FLOATING,
    check_choice,
    check_count,
    check_integer,
    check_number,
    check_positive,
    check_tensor,
    check_weight,
)
from facelt_ext._kept_tensors import KeepsTensors, check_saved_shape
from facelt_ext.functional._products import WORKSPACES
from facelt_ext.functional._reductions import REDUCTIONS
from facelt_ext.functional.margin_softmax import LARGEST_MULTIPLIER
from facelt_ext.losses._arguments import (
    check_indices_tuple,
    checked_sizes,
    new_weight,
    shown_sizes,
    whole_weight,
)
from facelt_ext.reference.margin_softmax import unit_rows
from facelt_ext.types import compute_dtype


class MarginSoftmaxLoss(KeepsTensors):
    """A classifier over normalised rows with its loss; what CosFace, ArcFace and SphereFace share.

    Args:
        num_classes: N.
        embedding_size: D.
        margin: a number, or one per class, [N].
        scale: of the cosines, positive.
        init_std: the standard deviation of the normal distribution that the weight is drawn from.
            The rows' norms have no influence on the loss, but on how fast SGD turns them: the
            gradient of a row of norm r is proportional to 1 / r, so a step turns it by an angle
            proportional to lr / r^2. With the 1 of pytorch-metric-learning that angle is 1 / 10,000
            of what it is with 0.01: `init_std=1` goes with learning rates of such a training.
        reduction, ignore_index, workspace: see `facelt_ext.functional.margin_softmax_loss`.
        device, dtype: of the weight.

    Attributes:
        weight: the parameter [N, D], a row per class.
        margin: saved in `state_dict()`, under this name, if there is one per class; a state_dict
            without it leaves it as it is.

    All other attributes may be changed between steps, `margin` from a number to a tensor too; a
    tensor of shape [B, 1] is taken as margins of the batch's samples, and is not saved.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or range.
    """

    _moved = ("margin",)
    _saved = {"margin": False}
    _margin_range = -math.inf, math.inf

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float | Tensor,
        scale: float,
        *,
        init_std: float = 0.01,
        reduction: str = "mean",
        ignore_index: int = -100,
        workspace: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_classes, embedding_size = checked_sizes(num_classes, embedding_size)
        self.margin = self._checked_margin(margin, num_classes)
        self.scale = check_positive(scale, "scale", torch.float32)
        self.init_std = check_positive(init_std, "init_std", torch.float32)
        self.reduction = check_choice(reduction, "reduction", REDUCTIONS)
        self.ignore_index = check_integer(ignore_index, "ignore_index")
        self.workspace = check_choice(workspace, "workspace", WORKSPACES)
        self.weight = new_weight(num_classes, embedding_size, num_classes, device, dtype)
        self._keep_where(self.weight)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.init_std)

    def logits(self, features: Tensor) -> Tensor:
        """scale * cosine of each feature [B, D] with each class, [B, N], without a margin."""
        features, weight, scale = self._for_logits(features)
        return scale * _unit_rows(features) @ weight.t()

    def _for_logits(self, features: Tensor) -> tuple[Tensor, Tensor, float]:
        """Features, unit rows in their dtype, and the scale."""
        weight, features = check_weight(whole_weight(self, "logits"), features)
        scale = check_positive(self.scale, "scale", torch.float32)
        return features, _unit_rows(weight).to(features.dtype), scale

    def _checked_margin(self, margin: float | Tensor, num_classes: int) -> float | Tensor:
        return checked_margin(margin, num_classes, *self._margin_range)

    def _checked_value(self, name: str, value: Tensor) -> Tensor:
        """Of a margin per class. A head whose margin is a number takes it too."""
        value = check_saved_shape(check_tensor(value, name), name, len(self.weight))
        value = self._checked_margin(value, len(self.weight))
        return value.to(self.margin.dtype) if isinstance(self.margin, Tensor) else value

    def _kept_tensors(self) -> dict[str, Tensor]:
        values = super()._kept_tensors()
        if "margin" in values and values["margin"].ndim != 1:
            del values["margin"]  # of a batch's samples
        return values

    def _margin(self) -> float | Tensor:
        """The margin where the weight is; moved there once."""
        if not isinstance(self.margin, Tensor):
            return self.margin
        margin, classes = self._kept_on("margin", self.weight.device), len(self.weight)
        if margin.ndim == 1 and len(margin) != classes:
            raise ValueError(
                f"margin: expected shape [{classes}], one for each row of weight, got "
                f"[{len(margin)}]; set head.margin to margins of all {classes} classes"
            )
        return margin

    def _loss(
        self, features: Tensor, labels: Tensor, indices_tuple: object, **margins: object
    ) -> Tensor:
        check_indices_tuple(indices_tuple)
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
        margin = "per class" if isinstance(self.margin, Tensor) else self.margin
        return f"{shown_sizes(self.weight)}, margin={margin}, scale={self.scale}"


def checked_margin(
    margin: float | Tensor, num_classes: int, minimum: float, maximum: float
) -> float | Tensor:
    """A number, or one per class, in [minimum, maximum]. A tensor's device is waited for."""
    if isinstance(margin, Tensor):
        margin = check_tensor(margin, "margin")
        if margin.dtype not in FLOATING:
            raise TypeError(f"margin: expected a floating dtype, got {margin.dtype}")
        if list(margin.shape) != [num_classes]:
            raise ValueError(
                f"margin: expected a number, or shape [{num_classes}], one per class, got "
                f"{list(margin.shape)}"
            )
        if margin.requires_grad:
            raise ValueError("margin: no gradient goes to margins; expected margin.detach()")
        margin = margin.detach()
        if margin.is_meta:
            return margin
        if not margin.isfinite().all():
            raise ValueError("margin: expected finite numbers, got others")
        smallest, largest = margin.min().item(), margin.max().item()
    else:
        margin = smallest = largest = check_number(margin, "margin", torch.float32)
    if smallest < minimum:
        raise ValueError(f"margin: expected at least {minimum}, got {smallest}")
    if largest > maximum:
        raise ValueError(
            f"margin: expected an angle in radians, at most pi, got {largest:.4g}; of degrees, "
            "expected math.radians of them"
        )
    return margin


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
        *,
        device: torch.device | str | None = None,
        **options: object,
    ) -> None:
        super().__init__(num_classes, embedding_size, margin, scale, device=device, **options)

    def forward(self, features: Tensor, labels: Tensor, indices_tuple: None = None) -> Tensor:
        """features [B, D] and integer labels [B] -> the loss."""
        return self._loss(features, labels, indices_tuple, cosine_margin=self._margin())


class ArcFaceLoss(MarginSoftmaxLoss):
    """ArcFace (Deng et al., arXiv:1801.07698, eq. 3): the margin is added to the target's angle.

    The gradient is the loss's derivative also where the angle and the margin pass pi, and where the
    public implementations take a straight-through one.

    Args:
        margin: in radians, in [0, pi], where pytorch-metric-learning takes degrees
            (`math.radians(28.6)` is 0.5); a number or one per class, [N].
        num_classes, embedding_size, scale, options: see `MarginSoftmaxLoss`.
    """

    _margin_range = 0.0, math.pi

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float | Tensor = 0.5,
        scale: float = 64.0,
        *,
        device: torch.device | str | None = None,
        **options: object,
    ) -> None:
        super().__init__(num_classes, embedding_size, margin, scale, device=device, **options)

    def forward(self, features: Tensor, labels: Tensor, indices_tuple: None = None) -> Tensor:
        """features [B, D] and integer labels [B] -> the loss."""
        return self._loss(features, labels, indices_tuple, angular_margin=self._margin())


class SphereFaceLoss(MarginSoftmaxLoss):
    """SphereFace (Liu et al., arXiv:1704.08063, eq. 7): the target's angle is multiplied.

    Features are not normalised: each sample's logits are multiplied with its feature's norm.

    Args:
        margin: what the angle is multiplied with, an integer in [1, 1000].
        num_classes, embedding_size, scale, options: see `MarginSoftmaxLoss`.
    """

    _moved = ()
    _saved = {}

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: int = 4,
        scale: float = 1.0,
        *,
        device: torch.device | str | None = None,
        **options: object,
    ) -> None:
        super().__init__(num_classes, embedding_size, margin, scale, device=device, **options)

    def _checked_margin(self, margin: int, num_classes: int) -> int:
        return check_count(margin, "margin", maximum=LARGEST_MULTIPLIER)

    def forward(self, features: Tensor, labels: Tensor, indices_tuple: None = None) -> Tensor:
        """features [B, D] and integer labels [B] -> the loss."""
        return self._loss(
            features,
            labels,
            indices_tuple,
            angular_multiplier=self._checked_margin(self.margin, len(self.weight)),
            normalize_features=False,
        )

    def logits(self, features: Tensor) -> Tensor:
        """scale * |feature| * cosine with each class, [B, N], without a margin."""
        features, weight, scale = self._for_logits(features)
        return scale * features @ weight.t()
