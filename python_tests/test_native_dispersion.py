"""The native functions of Aggregate-and-Disperse refuse tensors that do not fit."""

from __future__ import annotations

import pytest
import torch
from native_calls import MODULES, assert_refused_if_wrong, call, empty
from torch import Tensor


def integers(*values: int) -> Tensor:
    return torch.tensor(values)


INDEX, ORDER, OFFSETS = integers(0, 1, 0, 2, 2, 1), integers(0, 2, 1, 5, 3, 4), integers(0, 2, 4, 6)
LABELS = integers(0, 3, 7, 5)
# B = 4, two heads, six tails in three super classes, D = 3.
CALLS = {
    "super_class_mean_forward": {
        "weight": empty(6, 3), "order": ORDER, "offsets": OFFSETS, "means": empty(3, 3),
    },
    "super_class_mean_backward": {
        "grad_means": empty(3, 3), "super_class": INDEX, "order": ORDER, "offsets": OFFSETS,
        "grad_weight": empty(6, 3),
    },
    "dispersion_targets": {
        "features": empty(4, 3), "head_weight": empty(2, 3), "tail_weight": empty(6, 3),
        "labels": LABELS, "super_class": INDEX, "order": ORDER, "offsets": OFFSETS, "": -100,
        "classes": integers(0, 0, 0, 0), "targets": empty(3, 4),
    },
    "dispersion_feature_gradient": {
        "features": empty(4, 3), "tail_weight": empty(6, 3), "labels": LABELS,
        "classes": integers(0, 3, 3, 4), "order": ORDER, "offsets": OFFSETS, "lse": empty(4),
        "coefficients": empty(4), "": 2, "raw_features": empty(4, 3),
    },
    "dispersion_tail_gradient": {
        "raw": empty(2, 3), "gain": empty(1), "features": empty(4, 3), "tail_weight": empty(6, 3),
        "labels": LABELS, "order": ORDER, "offsets": OFFSETS, "sample_order": integers(0, 1, 2, 3),
        "sample_offsets": integers(1, 1, 3, 4), "lse": empty(4), "coefficients": empty(4), "": 2,
        " ": 1, "grad_tail": empty(6, 3),
    },
}  # fmt: skip
# What decides the others' sizes.
FREE = {
    "super_class_mean_forward": ("weight", "means"),
    "super_class_mean_backward": ("grad_means", "grad_weight"),
    "dispersion_targets": ("features", "head_weight", "tail_weight", "offsets"),
    "dispersion_feature_gradient": ("features", "tail_weight", "offsets"),
    "dispersion_tail_gradient": ("raw", "features", "tail_weight", "offsets"),
}
# What a backend has no need of, since it goes over the super classes or over the rows.
UNREAD = {("cpu", "super_class_mean_backward"): "super_class"}
UNREAD["emulated", "super_class_mean_backward"] = "order"


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (function, name)
        for function, arguments in CALLS.items()
        for name, value in arguments.items()
        if isinstance(value, Tensor)
    ],
)
def test_a_tensor_of_the_wrong_size_dtype_or_layout(module, function, name):
    if UNREAD.get((module, function)) != name:
        assert_refused_if_wrong(module, function, CALLS[function], name, name in FREE[function])


@pytest.mark.parametrize("module", MODULES)
def test_super_classes_beyond_the_last(module):
    """A chunk of more super classes than there are offsets for."""
    with pytest.raises(ValueError, match="raw: expected at most 1 "):
        call(module, "dispersion_tail_gradient", {**CALLS["dispersion_tail_gradient"], " ": 2})


@pytest.mark.parametrize("module", MODULES)
def test_means_may_be_in_a_half_type_of_float32_rows_only(module):
    function, arguments = "super_class_mean_forward", CALLS["super_class_mean_forward"]
    half, other = (empty(3, 3, dtype=dtype) for dtype in (torch.float16, torch.bfloat16))
    call(module, function, arguments, means=half)
    for weight, means in [(half, other), (other, half), (half, empty(3, 3).double())]:
        wide = weight.repeat(2, 1)
        with pytest.raises(ValueError, match="weight.*means"):
            call(module, function, arguments, weight=wide, means=means)
