from __future__ import annotations

import torch
from torch import Tensor

from facelt_ext import _backend, reference
from facelt_ext._checks import (
    check_class_range,
    check_count,
    check_matrix,
    check_positive,
    checked_integers,
)
from facelt_ext.reference.compactness import indicator
from facelt_ext.types import compute_dtype


def inter_class_compactness(
    weight: Tensor, index: Tensor | None = None, *, k: int = 100, scale: float = 64.0
) -> Tensor:
    """How crowded it is around each class (IC of Domain Balancing, Cao et al., CVPR 2020, eq. 1).

    `log of the sum of exp(scale * cosine)` over the k other classes whose rows of the weight have
    the largest cosines with the class's own. No gradient.

    Args:
        weight: [N, D], float64, float32, bfloat16 or float16; a row per class.
        index: [U] integers in [0, N), the classes to look at; None: all N.
        k: how many neighbours, at least 1; N - 1 and more mean all other classes.
        scale: of the cosines, positive.

    Returns:
        [U], float64 for a float64 weight, float32 otherwise; -inf where there is no other class.
        The neighbours are found exactly, in memory for a chunk of classes. There is no host
        synchronisation on CUDA: there an index out of range gives NaN;
        `facelt_ext.debug_checks(True)` makes it a ValueError, as on the CPU.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range.
    """
    index = _checked(weight, index, scale)
    check_count(k, "k")
    return _compactness(weight, index, k, float(scale))


def domain_frequency_indicator(
    weight: Tensor,
    index: Tensor | None = None,
    *,
    k: int = 100,
    scale: float = 64.0,
    epsilon: float | Tensor = 5.5,
    max_indicator: float = 2.0,
) -> Tensor:
    """Which classes are of rare domains (DFI of Domain Balancing, Cao et al., CVPR 2020, eq. 2).

    `epsilon / IC`, with IC the `inter_class_compactness`: large where few classes are near. It is
    `max_indicator` where the quotient is larger, and where IC is not positive. No gradient.

    Args:
        weight, index, scale: see `inter_class_compactness`.
        k: as there; 0 makes every indicator 1, so that Domain Balancing is plain CosFace.
        epsilon: a positive number, or a tensor [] (which costs no host synchronisation).
        max_indicator: the largest indicator, positive.

    Returns:
        [U], float64 for a float64 weight, float32 otherwise.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range.
    """
    index = _checked(weight, index, scale)
    check_count(k, "k", minimum=0)
    compute = compute_dtype(weight.dtype)
    check_positive(max_indicator, "max_indicator", compute)
    if isinstance(epsilon, Tensor):
        if epsilon.ndim != 0 or epsilon.device != weight.device:
            raise ValueError(
                f"epsilon: expected a number, or shape [] on {weight.device}, got "
                f"{list(epsilon.shape)} on {epsilon.device}"
            )
    else:
        check_positive(epsilon, "epsilon", compute)
    if k == 0:
        return weight.new_ones(len(weight) if index is None else len(index), dtype=compute)
    return indicator(_compactness(weight, index, k, float(scale)), epsilon, max_indicator)


def _checked(weight: Tensor, index: Tensor | None, scale: float) -> Tensor | None:
    """The index as int64."""
    check_matrix(weight, "weight")
    if len(weight) < 1:
        raise ValueError(f"weight: expected at least one row, got {list(weight.shape)}")
    check_positive(scale, "scale", compute_dtype(weight.dtype))
    if index is None:
        return None
    if not isinstance(index, Tensor) or index.ndim != 1:
        kind = list(index.shape) if isinstance(index, Tensor) else type(index).__name__
        raise ValueError(f"index: expected a tensor [classes to look at], got {kind}")
    index = checked_integers(index, "index", index, "index")
    if index.device != weight.device:
        raise ValueError(
            f"index: expected device {weight.device}, where weight is, got {index.device}"
        )
    if _backend.current() == "reference" or _backend.debugging():
        check_class_range(index, "index", len(weight), None)
    return index


def _compactness(weight: Tensor, index: Tensor | None, k: int, scale: float) -> Tensor:
    return reference.inter_class_compactness(weight.detach(), index, k=k, scale=scale)
