from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from facelt_ext import functional
from facelt_ext._checks import check_count, check_integers, check_weight
from facelt_ext.aggregation import SuperClasses
from facelt_ext.functional._label_map import IGNORED, mapped_labels
from facelt_ext.functional.dispersion import dispersion_loss


class SuperClassLoss(nn.Module):
    """A classifier without bias with its loss; what both steps of Aggregate-and-Disperse share.

    Args:
        num_classes: N, the classes of the data set.
        embedding_size: D.
        super_classes: which of them are heads, and the super class of each of the others.
        reduction, ignore_index, workspace: see `facelt_ext.functional.margin_softmax_loss`; they
            may be changed between steps.
        device, dtype: of the weight.

    Attributes:
        label_map: int64 [N], the row of `weight` that belongs to each class.

    It is called with the data set's own labels, as a loss over all classes is: losses over all
    classes can be added to it.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        super_classes: SuperClasses,
        rows: int,
        label_map: Tensor,
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
        if super_classes.num_classes != num_classes:
            raise ValueError(
                f"num_classes: expected {super_classes.num_classes}, as super_classes has, got "
                f"{num_classes}"
            )
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.workspace = workspace
        self.weight = nn.Parameter(torch.empty(rows, embedding_size, device=device, dtype=dtype))
        self.register_buffer("label_map", label_map.to(self.weight.device))

    def _rows(self, features: Tensor, labels: Tensor) -> Tensor:
        """The row of each sample's class, [B]."""
        features = check_weight(self.weight, features)[1]
        labels = check_integers(labels, "labels", features, "features")
        return mapped_labels(labels, self.label_map, self.ignore_index)

    def extra_repr(self) -> str:
        return f"num_classes={len(self.label_map)}, embedding_size={self.weight.shape[1]}"


def draw_rows(weight: Tensor) -> Tensor:
    """As torch.nn.Linear does."""
    return nn.init.kaiming_uniform_(weight, a=math.sqrt(5))


class AggregatedSoftmaxLoss(SuperClassLoss):
    """Step I of Aggregate-and-Disperse (Ma et al. 2020, eq. 5): softmax over N_h heads and S
    super classes.

    The same as `torch.nn.Linear(D, N_h + S, bias=False)` with `torch.nn.functional.cross_entropy`
    on `super_classes.coarse_labels(labels)`, in less memory.

    Args:
        num_classes, embedding_size, super_classes, options: see `SuperClassLoss`.

    Attributes:
        weight: the parameter [N_h + S, D], drawn as torch.nn.Linear draws it.
    """

    def __init__(
        self, num_classes: int, embedding_size: int, super_classes: SuperClasses, **options: object
    ) -> None:
        super().__init__(
            num_classes,
            embedding_size,
            super_classes,
            super_classes.num_coarse,
            super_classes.coarse_labels(torch.arange(super_classes.num_classes)),
            **options,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        draw_rows(self.weight)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """features [B, D] and the data set's labels [B] -> the loss."""
        return functional.margin_softmax_loss(
            features,
            self.weight,
            self._rows(features, labels),
            scale=1.0,
            normalize_features=False,
            normalize_weight=False,
            reduction=self.reduction,
            ignore_index=IGNORED,
            workspace=self.workspace,
        )

    def logits(self, features: Tensor) -> Tensor:
        """Of each feature [B, D] with the heads and the super classes, [B, N_h + S]."""
        return features @ self.weight.t().to(features.dtype)


class DispersionLoss(SuperClassLoss):
    """Step II of Aggregate-and-Disperse (Ma et al. 2020, eqs. 6-8): softmax over all N classes, of
    which only the sample's own super class is dispersed.

    See `facelt_ext.functional.dispersion_softmax_loss`. `from_aggregated` begins where step I
    ended, which is what the paper does.

    Args:
        num_classes, embedding_size, super_classes, options: see `SuperClassLoss`.

    Attributes:
        weight: the parameter [N, D], first the heads' rows, then the tails'; drawn as
            torch.nn.Linear draws them, one row for all members of a super class.
        super_class: the `facelt_ext.functional.SuperClassIndex` of the tails.
    """

    def __init__(
        self, num_classes: int, embedding_size: int, super_classes: SuperClasses, **options: object
    ) -> None:
        super().__init__(
            num_classes,
            embedding_size,
            super_classes,
            super_classes.num_classes,
            super_classes.dispersed_labels(torch.arange(super_classes.num_classes)),
            **options,
        )
        index = functional.SuperClassIndex(
            super_classes.super_class, super_classes.num_super_classes
        )
        self.super_class = index.to(self.weight.device)
        self.reset_parameters()

    @classmethod
    def from_aggregated(
        cls, step_one_loss: AggregatedSoftmaxLoss, super_classes: SuperClasses
    ) -> DispersionLoss:
        """Heads' rows are copied, and each tail's is that of its super class. A head's sample then
        has the loss that it had in step I.

        Device, dtype and options are those of step I.

        Raises:
            ValueError: step I had other super classes.
        """
        weight = step_one_loss.weight
        every = torch.arange(super_classes.num_classes)
        expected = super_classes.coarse_labels(every)
        if not torch.equal(step_one_loss.label_map.cpu(), expected):
            raise ValueError(
                "super_classes: expected those that step_one_loss was made with, got others: "
                f"{super_classes!r}"
            )
        loss = cls(
            super_classes.num_classes,
            weight.shape[1],
            super_classes,
            reduction=step_one_loss.reduction,
            ignore_index=step_one_loss.ignore_index,
            workspace=step_one_loss.workspace,
            device=weight.device,
            dtype=weight.dtype,
        )
        loss._spread(weight)
        return loss

    def reset_parameters(self) -> None:
        coarse = self._heads() + self.super_class.num_super_classes
        self._spread(draw_rows(self.weight.new_empty(coarse, self.weight.shape[1])))

    @torch.no_grad()
    def _spread(self, coarse: Tensor) -> None:
        heads = self._heads()
        self.weight[:heads] = coarse[:heads]
        self.weight[heads:] = coarse[heads:][self.super_class.index]

    def _heads(self) -> int:
        return len(self.weight) - len(self.super_class.index)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """features [B, D] and the data set's labels [B] -> the loss."""
        rows = self._rows(features, labels)
        return dispersion_loss(
            features,
            self.weight,
            None,
            self.super_class,
            rows,
            None,
            self.reduction,
            IGNORED,
            self.workspace,
        )

    def logits(self, features: Tensor) -> Tensor:
        """Of each feature [B, D] with every class, all dispersed, [B, N] in the labels' order."""
        return (features @ self.weight.t().to(features.dtype))[:, self.label_map]
