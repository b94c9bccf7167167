"""The papers' losses as modules, called as `loss(features, labels)`."""

from facelt_ext.losses.aggregate_disperse import AggregatedSoftmaxLoss, DispersionLoss
from facelt_ext.losses.clmle import CLMLELoss, between_margin_max, within_margin_max
from facelt_ext.losses.conversion import convert_state_dict
from facelt_ext.losses.domain_balancing import DomainBalancingLoss, ResidualBalancingModule
from facelt_ext.losses.lmle import LMLELoss
from facelt_ext.losses.margin_softmax import ArcFaceLoss, CosFaceLoss, SphereFaceLoss
from facelt_ext.losses.range_loss import RangeLoss

__all__ = [
    "AggregatedSoftmaxLoss",
    "ArcFaceLoss",
    "CLMLELoss",
    "CosFaceLoss",
    "DispersionLoss",
    "DomainBalancingLoss",
    "LMLELoss",
    "RangeLoss",
    "ResidualBalancingModule",
    "SphereFaceLoss",
    "between_margin_max",
    "convert_state_dict",
    "within_margin_max",
]
