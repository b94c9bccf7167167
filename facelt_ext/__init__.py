"""Fused, drop-in losses for face recognition on long-tailed data."""

# torch comes first: the native module shares its OpenMP runtime.
import torch  # noqa: F401

from facelt_ext import functional, reference
from facelt_ext._backend import debug_checks, use_backend
from facelt_ext._native import build_info
from facelt_ext.losses import RangeLoss

__version__ = build_info()["version"]

__all__ = [
    "RangeLoss",
    "build_info",
    "debug_checks",
    "functional",
    "reference",
    "use_backend",
]
