from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from facelt_ext import functional
from facelt_ext._checks import check_choice, check_integer, check_integers, check_weight
from facelt_ext._kept_tensors import KeepsTensors
from facelt_ext.aggregation import SuperClasses
from facelt_ext.functional._label_map import IGNORED, check_label_map, mapped_labels
from facelt_ext.functional._products import WORKSPACES
from facelt_ext.functional._reductions import REDUCTIONS
from facelt_ext.functional.dispersion import dispersion_loss
from facelt_ext.losses._arguments import (
    check_indices_tuple,
    checked_sizes,
    new_weight,
    shown_sizes,
    whole_weight,
)


class SuperClassLoss(KeepsTensors):
    """A classifier without bias with its loss; what both steps of Aggregate-and-Disperse share.

    Args:
        num_classes: N, the classes of the data set.
        embedding_size: D.
        super_classes: which of them are heads, and the super class of each of the others.
        reduction, ignore_index, workspace: see `facelt_ext.functional.margin_softmax_loss`; they
            may be changed between steps.
        device, dtype: of the weight.

    Attributes:
        label_map: int64 [N], the row of `weight` that belongs to each class; no buffer, but saved
            in `state_dict()`. A map that is loaded has to be int64 and to have a class for each
            row, so that one that was cast or averaged is refused. In several processes, and on the
            meta device, each module has that of its own `super_classes` until it is loaded.

    It is called with the data set's own labels, as a loss over all classes is: losses over all
    classes can be added to it.
    """

    _moved = ("label_map",)
    _saved = {"label_map": True}

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        super_classes: SuperClasses,
        *,
        reduction: str = "mean",
        ignore_index: int = -100,
        workspace: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_classes, embedding_size = checked_sizes(num_classes, embedding_size)
        check_super_classes(super_classes)
        if super_classes.num_classes != num_classes:
            raise ValueError(
                f"num_classes: expected {super_classes.num_classes}, as super_classes has, got "
                f"{num_classes}"
            )
        self.reduction = check_choice(reduction, "reduction", REDUCTIONS)
        self.ignore_index = check_integer(ignore_index, "ignore_index")
        self.workspace = check_choice(workspace, "workspace", WORKSPACES)
        # Whatever the surrounding default device is: indices need values.
        with torch.device("cpu"):
            self._num_rows, self.label_map = self._rows_of(super_classes)
        self.weight = new_weight(num_classes, embedding_size, self._num_rows, device, dtype)
        self._keep_where(self.weight)
        self.reset_parameters()

    def _rows_of(self, super_classes: SuperClasses) -> tuple[int, Tensor]:
        """How many rows the weight has, and that of each class."""
        raise NotImplementedError

    def _checked_value(self, name: str, value: Tensor) -> Tensor:
        return check_label_map(value, len(self.label_map), self._num_rows)

    def _rows(self, features: Tensor, labels: Tensor) -> Tensor:
        """The row of each sample's class, [B]."""
        weight, features = check_weight(self.weight, features)
        if len(weight) != self._num_rows:
            raise ValueError(
                f"weight: expected {self._num_rows} rows, those of the super classes that the loss "
                f"was made with, got {len(weight)}; {type(self).__name__}(num_classes, "
                "embedding_size, super_classes) makes one for others"
            )
        labels = check_integers(labels, "labels", features, "features")
        ignore_index = check_integer(self.ignore_index, "ignore_index")
        return mapped_labels(labels, self._kept_on("label_map", labels.device), ignore_index)

    def _products(self, features: Tensor) -> Tensor:
        """Of each feature with each row."""
        weight, features = check_weight(whole_weight(self, "logits"), features)
        return features @ weight.t().to(features.dtype)

    def extra_repr(self) -> str:
        sizes = shown_sizes(self.weight).split(", ")
        return ", ".join([f"num_classes={len(self.label_map)}", *sizes[1:]])


def check_super_classes(super_classes: SuperClasses) -> None:
    if not isinstance(super_classes, SuperClasses):
        raise TypeError(
            "super_classes: expected facelt_ext.aggregation.SuperClasses, got "
            f"{type(super_classes).__name__}"
        )


def draw_rows(weight: Tensor) -> Tensor:
    """As torch.nn.Linear does."""
    return nn.init.kaiming_uniform_(weight, a=math.sqrt(5))


def copy_rows(weight: Tensor, rows: Tensor) -> None:
    """Into a weight that may have been sharded by fully_shard."""
    if callable(getattr(weight, "full_tensor", None)):
        from torch.distributed.tensor import distribute_tensor

        rows = distribute_tensor(rows, weight.device_mesh, weight.placements)
    weight.copy_(rows)


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

    def _rows_of(self, super_classes: SuperClasses) -> tuple[int, Tensor]:
        every = torch.arange(super_classes.num_classes)
        return super_classes.num_coarse, super_classes.coarse_labels(every)

    def reset_parameters(self) -> None:
        draw_rows(self.weight)

    def forward(self, features: Tensor, labels: Tensor, indices_tuple: None = None) -> Tensor:
        """features [B, D] and the data set's labels [B] -> the loss."""
        check_indices_tuple(indices_tuple)
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
        return self._products(features)


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

    def _rows_of(self, super_classes: SuperClasses) -> tuple[int, Tensor]:
        self.super_class = functional.SuperClassIndex(
            super_classes.super_class, super_classes.num_super_classes
        )
        every = torch.arange(super_classes.num_classes)
        return super_classes.num_classes, super_classes.dispersed_labels(every)

    def _checked_state(self, state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
        # Before the rows are loaded, which belong to it.
        self.super_class._checked_state(state_dict, prefix + "super_class.")
        return super()._checked_state(state_dict, prefix)

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
        if not isinstance(step_one_loss, AggregatedSoftmaxLoss):
            raise TypeError(
                f"step_one_loss: expected AggregatedSoftmaxLoss, got {type(step_one_loss).__name__}"
            )
        check_super_classes(super_classes)
        weight = whole_weight(step_one_loss, "from_aggregated")
        every = torch.arange(super_classes.num_classes, device="cpu")
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
        weight = self.weight
        coarse = self._heads() + self.super_class.num_super_classes
        kind = {"device": weight.device, "dtype": weight.dtype}
        self._spread(draw_rows(torch.empty(coarse, weight.shape[1], **kind)))

    @torch.no_grad()
    def _spread(self, coarse: Tensor) -> None:
        heads = self._heads()
        members = self.super_class._kept_on("index", coarse.device)
        first = torch.arange(heads, device=coarse.device)
        copy_rows(self.weight, coarse[torch.cat([first, heads + members])])

    def _heads(self) -> int:
        return len(self.weight) - len(self.super_class.index)

    def forward(self, features: Tensor, labels: Tensor, indices_tuple: None = None) -> Tensor:
        """features [B, D] and the data set's labels [B] -> the loss."""
        check_indices_tuple(indices_tuple)
        rows = self._rows(features, labels)
        return dispersion_loss(
            features,
            self.weight,
            None,
            self.super_class._on(rows.device),
            rows,
            self.reduction,
            IGNORED,
            self.workspace,
        )

    def logits(self, features: Tensor) -> Tensor:
        """Of each feature [B, D] with every class, all dispersed, [B, N] in the labels' order."""
        return self._products(features)[:, self._kept_on("label_map", features.device)]
