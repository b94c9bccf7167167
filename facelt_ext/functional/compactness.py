from __future__ import annotations

import torch
from torch import Tensor

from facelt_ext import _backend, _native, reference
from facelt_ext._autocast import autocast_off
from facelt_ext._checks import (
    FLOATING,
    check_class_range,
    check_count,
    check_integers,
    check_matrix,
    check_positive,
    check_tensor,
    check_values,
)
from facelt_ext._operators import operator
from facelt_ext.functional._products import (
    WeightChunks,
    chunk_size,
    convertible,
    normalized_rows,
    product_dtype,
    product_flops,
)
from facelt_ext.reference.compactness import indicator
from facelt_ext.types import compute_dtype

# How many products may be kept at a time, for all classes that are looked at side by side.
KEPT_NUMBERS = 1 << 22


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
    weight, index, scale = _checked(weight, index, scale)
    return _compactness(weight, index, check_count(k, "k"), scale)


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
    weight, index, scale = _checked(weight, index, scale)
    k = check_count(k, "k", minimum=0)
    compute = compute_dtype(weight.dtype)
    epsilon = check_epsilon(epsilon, weight)
    max_indicator = check_positive(max_indicator, "max_indicator", compute)
    if k == 0:
        return weight.new_ones(weight.shape[0] if index is None else index.shape[0], dtype=compute)
    return indicator(_compactness(weight, index, k, scale), epsilon, max_indicator)


def _checked(
    weight: Tensor, index: Tensor | None, scale: float
) -> tuple[Tensor, Tensor | None, float]:
    weight = check_matrix(weight, "weight")
    check_values(weight, "weight")
    if weight.shape[0] < 1:
        raise ValueError(f"weight: expected at least one row, got {list(weight.shape)}")
    scale = float(check_positive(scale, "scale", compute_dtype(weight.dtype)))
    if index is None:
        return weight, None, scale
    index = check_integers(index, "index")
    if index.ndim != 1:
        raise ValueError(f"index: expected shape [classes to look at], got {list(index.shape)}")
    if index.device != weight.device:
        raise ValueError(
            f"index: expected device {weight.device}, where weight is, got {index.device}"
        )
    return weight, index, scale


def check_epsilon(epsilon: float | Tensor, weight: Tensor) -> float | Tensor:
    if not isinstance(epsilon, Tensor):
        return check_positive(epsilon, "epsilon", compute_dtype(weight.dtype))
    epsilon = check_tensor(epsilon, "epsilon")
    if epsilon.dtype not in FLOATING:
        raise TypeError(f"epsilon: expected a floating dtype, got {epsilon.dtype}")
    if epsilon.ndim != 0 or epsilon.device != weight.device:
        raise ValueError(
            f"epsilon: expected a number, or shape [] on {weight.device}, got "
            f"{list(epsilon.shape)} on {epsilon.device}"
        )
    return epsilon.detach()


def _compactness(weight: Tensor, index: Tensor | None, k: int, scale: float) -> Tensor:
    weight = weight.detach()
    backend = _backend.of_call("inter_class_compactness", weight, traceable=True)
    if backend == "reference":
        if index is not None:
            check_class_range(index, "index", weight.shape[0], None)
        with autocast_off(weight.device.type):
            return reference.inter_class_compactness(weight, index, k=k, scale=scale)
    if index is None:
        index = torch.arange(weight.shape[0], device=weight.device)
    elif _backend.debugging():
        check_class_range(index, "index", weight.shape[0], None)
    dtype = product_dtype(weight.dtype, weight.dtype, weight.device.type)
    return _operator(convertible(weight, dtype), index, k, scale, dtype, backend)


def _fake(weight, index, k, scale, dtype, backend):
    return weight.new_empty(index.shape[0], dtype=compute_dtype(dtype))


def _flops(weight, index, *_):
    return product_flops(index.shape[0], *weight.shape)


@operator(
    "inter_class_compactness(Tensor weight, Tensor index, SymInt k, float scale, ScalarType dtype,"
    " str backend) -> Tensor",
    _fake,
    flops=_flops,
)
def _operator(weight, index, k, scale, dtype, backend):
    weight, index = weight.contiguous(), index.contiguous()
    if backend == "native" and weight.is_cpu:
        check_class_range(index, "index", weight.shape[0], None)
    compactness = _fake(weight, index, k, scale, dtype, backend)
    others = weight.shape[0] - 1
    classes = index.clamp(0, others)
    if others == 0:
        return torch.where(index == classes, compactness.fill_(-torch.inf), torch.nan)
    k = min(k, others)
    dimensions, device = weight.shape[1], weight.device.type
    capacity = 0 if k == others else _native.call(backend, weight, "compactness_capacity", k)
    at_once = rows_at_once(capacity, index.shape[0])
    size = chunk_size(at_once, dimensions, dtype, device)
    chunks = WeightChunks(weight, True, dtype, size, backend)
    run = _with_all if k == others else _with_nearest
    with autocast_off(device):
        for begin in range(0, index.shape[0], max(at_once, 1)):
            rows = slice(begin, begin + at_once)
            own = classes[rows]
            operand = normalized_rows(weight[own], dtype, backend)[0]
            run(chunks, operand, own, k, scale, compactness[rows])
    return torch.where(index == classes, compactness, torch.nan)


def rows_at_once(capacity: int, count: int) -> int:
    """Classes whose neighbours are looked for side by side, which bounds the memory they take."""
    return min(count, 1024, max(64, KEPT_NUMBERS // max(capacity, 1)))


def _with_nearest(
    chunks: WeightChunks, operand: Tensor, own: Tensor, k: int, scale: float, compactness: Tensor
) -> None:
    backend, compute = chunks.backend, compactness.dtype
    capacity = _native.call(backend, operand, "compactness_capacity", k)
    kept = operand.new_empty(own.shape[0], capacity, dtype=compute)
    counts, thresholds = torch.empty_like(own), torch.empty_like(compactness)
    for first, products, scales in chunks.products(operand):
        _native.run(
            backend, operand, "compactness_select", products, scales, own, first, k, first == 0,
            kept, counts, thresholds,
        )  # fmt: skip
    _native.run(backend, operand, "compactness_reduce", kept, counts, k, scale, compactness)


def _with_all(
    chunks: WeightChunks, operand: Tensor, own: Tensor, k: int, scale: float, compactness: Tensor
) -> None:
    """All others are the k nearest: the softmax's normaliser, without the class itself."""
    compute = compactness.dtype
    targets = operand.new_full((3, own.shape[0]), -torch.inf, dtype=compute)
    normalizer = operand.new_empty(2, own.shape[0], dtype=compute)
    for first, products, scales in chunks.products(operand):
        _native.run(
            chunks.backend, operand, "margin_softmax_normalizer", products, scales, own, targets,
            first, scale, first == 0, normalizer,
        )  # fmt: skip
    torch.add(normalizer[0], normalizer[1].log(), out=compactness)
