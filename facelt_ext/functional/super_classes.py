from __future__ import annotations

import torch
from torch import Tensor

from facelt_ext import _backend, _native, reference
from facelt_ext._checks import (
    check_count,
    check_integers,
    check_matrix,
    check_size,
    check_values,
)
from facelt_ext._kept_tensors import KeepsTensors, check_saved_integers
from facelt_ext._operators import operator


class SuperClassIndex(KeepsTensors):
    """Which super class each class belongs to, checked and sorted once.

    A module, so that it is moved and saved with the loss that holds it. Its tensors are no buffers:
    they stay int64 and what they are, whatever averages, casts or empties the module.

    Args:
        super_class: [N] integers in [0, S): the super class of each class.
        num_super_classes: S; None: as many as the largest number says.

    Attributes:
        index: int64 [N], as it was given.
        order: int64 [N], the classes by super class, in ascending order within each.
        offsets: int64 [S + 1]; order[offsets[s]] to order[offsets[s + 1] - 1] belong to s.

    Raises:
        TypeError, ValueError: an index of the wrong type, dtype, shape or range, or a super class
            without a class; the same for an index that is loaded, whose dtype has to be int64.
    """

    _moved = ("index", "order", "offsets")
    # The others follow from it, and are not to be believed where they would contradict it.
    _saved = {"index": True}

    def __init__(self, super_class: Tensor, num_super_classes: int | None = None) -> None:
        super().__init__()
        self.index = checked_super_class(super_class)
        count = _checked_count(self.index, num_super_classes)
        self.order, self.offsets = sorted_members(self.index, count, True)

    @property
    def num_super_classes(self) -> int:
        return len(self.offsets) - 1

    def reset_parameters(self) -> None:
        """Nothing is drawn. FSDP and Lightning call it where a module was on the meta device."""

    def counts(self) -> Tensor:
        """How many classes each super class has, int64 [S]."""
        return self.offsets.diff()

    def extra_repr(self) -> str:
        return f"{len(self.index)} classes in {self.num_super_classes} super classes"

    def _on(self, device: torch.device) -> SuperClassIndex:
        """Itself, moved."""
        for name in self._moved:
            self._kept_on(name, device)
        return self

    def _checked_value(self, name: str, value: Tensor) -> Tensor:
        value = check_saved_integers(value, "super_class", len(self.index))
        # Kernels follow the index wherever it points.
        sorted_members(value, self.num_super_classes, True)
        return value

    def _take(self, values: dict[str, Tensor], assign: bool) -> None:
        super()._take(values, assign)
        # A backward saves them, which it could not if they were made in inference mode.
        with torch.inference_mode(False):
            self.order, self.offsets = sorted_members(self.index, self.num_super_classes, False)


def checked_super_class(super_class: Tensor) -> Tensor:
    super_class = check_integers(super_class, "super_class")
    if super_class.ndim != 1:
        raise ValueError(
            f"super_class: expected shape [classes], one for each, got {list(super_class.shape)}"
        )
    check_values(super_class, "super_class")
    return super_class.to(torch.int64, copy=True)


def _sorted_fake(index, num_super_classes, check):
    return torch.empty_like(index), index.new_empty(num_super_classes + 1)


@operator(
    "super_class_members(Tensor index, SymInt num_super_classes, bool check) -> (Tensor, Tensor)",
    _sorted_fake,
)
def sorted_members(index, num_super_classes, check):
    """The order and the offsets of a SuperClassIndex; indices out of range lie beyond both ends."""
    order = torch.argsort(index, stable=True)
    bounds = torch.arange(num_super_classes + 1, device=index.device)
    offsets = torch.searchsorted(index[order], bounds)
    if check:
        check_assignment(index, offsets)
    return order, offsets


def check_assignment(index: Tensor, offsets: Tensor) -> None:
    """Waits for the device."""
    count = len(offsets) - 1
    wrong = ((index < 0) | (index >= count)).nonzero()
    if len(wrong):
        position = int(wrong[0])
        raise ValueError(
            f"super_class: expected numbers in [0, {count}), got {int(index[position])} at "
            f"position {position}"
        )
    empty = (offsets.diff() == 0).nonzero()
    if len(empty):
        raise ValueError(
            f"super_class: expected a class in each of the {count} super classes, got none in "
            f"{len(empty)} of them, the first of which is {int(empty[0])}"
        )


def super_class_mean(
    weight: Tensor,
    super_class: Tensor | SuperClassIndex,
    num_super_classes: int | None = None,
) -> Tensor:
    """The mean row of each super class (Aggregate-and-Disperse, Ma et al. 2020, eq. 7).

    Args:
        weight: [N, D], float64, float32, bfloat16 or float16.
        super_class: a `SuperClassIndex` of N classes, or [N] integers in [0, S). The second is
            sorted at every call.
        num_super_classes: S; None: what the index says. A tensor on CUDA is then waited for.

    Returns:
        [S, D] in the weight's dtype, added up in float32 (float64 for float64), differentiable. A
        tensor on CUDA is not checked if `num_super_classes` is given: a super class without a row
        is NaN, and a row whose number is out of range is left out and gets a gradient of NaN.
        `facelt_ext.debug_checks(True)` makes both a ValueError, as on the CPU.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range, or a
            super class without a row.
    """
    weight = check_matrix(weight, "weight")
    index, order, offsets = members_of(super_class, num_super_classes)
    if len(index) != len(weight) or index.device != weight.device:
        raise ValueError(
            f"super_class: expected shape [{len(weight)}] on {weight.device}, one for each row of "
            f"weight, got {list(index.shape)} on {index.device}"
        )
    backend = _backend.of_call("super_class_mean", weight, traceable=True)
    if backend == "reference":
        return reference.super_class_mean(weight, index, len(offsets) - 1)
    return SuperClassMeanFunction.apply(weight, index, order, offsets, backend)


def members_of(
    super_class: Tensor | SuperClassIndex, num_super_classes: int | None, check: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """index, order and offsets; with `check` an index on CUDA is waited for."""
    if isinstance(super_class, SuperClassIndex):
        if num_super_classes not in (None, super_class.num_super_classes):
            raise ValueError(
                f"num_super_classes: expected {super_class.num_super_classes}, as super_class has,"
                f" got {num_super_classes}"
            )
        return super_class.index, super_class.order, super_class.offsets
    index = checked_super_class(super_class)
    check = check or not index.is_cuda or _backend.debugging()
    return index, *sorted_members(index, _checked_count(index, num_super_classes), check)


def _checked_count(index: Tensor, num_super_classes: int | None) -> int:
    """None: what the index says, which waits for the device."""
    if num_super_classes is None:
        if torch.compiler.is_compiling():
            raise ValueError(
                "num_super_classes: expected a number under torch.compile, where no one reads what "
                "super_class says, or a SuperClassIndex made before; got None"
            )
        largest = int(index.max()) if len(index) else -1
        # A stray large number must not ask for as much memory.
        if largest >= len(index):
            raise ValueError(
                f"super_class: expected numbers in [0, {len(index)}), as each super class has a "
                f"class, got {largest}"
            )
        return max(largest, 0) + 1 if len(index) else 0
    count = check_count(num_super_classes, "num_super_classes", minimum=min(len(index), 1))
    check_size("num_super_classes", count)
    return count


class SuperClassMeanFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, index, order, offsets, backend):
        ctx.save_for_backward(index, order, offsets)
        ctx.backend = backend
        return segment_mean(weight, order, offsets, weight.dtype, backend)

    @staticmethod
    def backward(ctx, grad_means):
        index, order, offsets = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return _mean_backward(grad_means, index, order, offsets, ctx.backend), *[None] * 4
        # It is linear: its gradient is the means' own, by each row's share.
        count = len(offsets) - 1
        valid = (index >= 0) & (index < count)
        rows = (grad_means / offsets.diff()[:, None])[torch.where(valid, index, 0)]
        return torch.where(valid[:, None], rows, torch.nan), *[None] * 4


def _mean_fake(weight, order, offsets, dtype, backend):
    return weight.new_empty(offsets.shape[0] - 1, weight.shape[1], dtype=dtype)


@operator(
    "super_class_mean_forward(Tensor weight, Tensor order, Tensor offsets, ScalarType dtype,"
    " str backend) -> Tensor",
    _mean_fake,
)
def segment_mean(weight, order, offsets, dtype, backend):
    """The mean [S, D] of the rows order[offsets[s]] to order[offsets[s + 1] - 1]."""
    weight = weight.contiguous()
    shape = len(offsets) - 1, weight.shape[1]
    means = _native.large_output(weight, shape[0] * shape[1], dtype).view(shape)
    _native.run(backend, weight, "super_class_mean_forward", weight, order, offsets, means)
    return means


def _mean_backward_fake(grad_means, index, order, offsets, backend):
    return grad_means.new_empty(index.shape[0], grad_means.shape[1])


@operator(
    "super_class_mean_backward(Tensor grad_means, Tensor index, Tensor order, Tensor offsets,"
    " str backend) -> Tensor",
    _mean_backward_fake,
)
def _mean_backward(grad_means, index, order, offsets, backend):
    shape = len(index), grad_means.shape[1]
    grad = _native.large_output(grad_means, shape[0] * shape[1], grad_means.dtype).view(shape)
    _native.run(
        backend, grad_means, "super_class_mean_backward", grad_means.contiguous(), index, order,
        offsets, grad,
    )  # fmt: skip
    return grad
