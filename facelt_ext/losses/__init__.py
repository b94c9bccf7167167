"""The papers' losses as modules, called as `loss(features, labels)`."""

from facelt_ext.losses.range_loss import RangeLoss

__all__ = ["RangeLoss"]
