"""Fused, drop-in losses for face recognition on long-tailed data."""

# torch comes first: the native module shares its OpenMP runtime.
import torch  # noqa: F401

from facelt_ext import functional, reference
from facelt_ext._backend import debug_checks, use_backend
from facelt_ext._native import build_info
from facelt_ext._version import VERSION
from facelt_ext.losses import (
    AggregatedSoftmaxLoss,
    ArcFaceLoss,
    CLMLELoss,
    CosFaceLoss,
    DispersionLoss,
    DomainBalancingLoss,
    LMLELoss,
    RangeLoss,
    ResidualBalancingModule,
    SphereFaceLoss,
    between_margin_max,
    convert_state_dict,
    within_margin_max,
)

__version__ = VERSION

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
    "build_info",
    "convert_state_dict",
    "debug_checks",
    "functional",
    "reference",
    "use_backend",
    "within_margin_max",
]
