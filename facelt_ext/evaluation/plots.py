"""Pictures of what the protocols give; they need matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from facelt_ext._checks import FLOATING, check_number
from facelt_ext._pictures import checked_axes
from facelt_ext.evaluation._arrays import Array, as_tensor, integers
from facelt_ext.evaluation.operating_points import ROC

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_roc(
    curves: Mapping[str, ROC], axes: Axes | None = None, lowest_far: float | None = None
) -> Axes:
    """True accept rates over false accept rates, these on a logarithmic axis.

    Args:
        curves: by name.
        axes: where to draw; by default on a figure of its own, `axes.figure.savefig(...)`.
        lowest_far: where the axis begins; by default at the lowest rate above 0 of a curve, or
            at 0.1.
    """
    for name, curve in _checked_mapping(curves, "curves").items():
        if not isinstance(curve, ROC):
            raise TypeError(f"curves[{name!r}]: expected an ROC, got {type(curve).__name__}")
    axes = checked_axes(axes, "axes")
    if lowest_far is None:
        reached = [float(each.far[each.far > 0].min()) for each in curves.values()]
        lowest_far = min([0.1, *reached])
    elif not 0 < check_number(lowest_far, "lowest_far", torch.float64) < 1:
        raise ValueError(f"lowest_far: expected a rate in (0, 1), got {lowest_far}")
    for name, curve in curves.items():
        axes.step(curve.far.clamp(min=lowest_far / 10), curve.tar, where="post", label=name)
    axes.set(
        xscale="log",
        xlim=(lowest_far, 1),
        ylim=(0, 1.01),
        xlabel="false accept rate",
        ylabel="true accept rate",
    )
    return _finish(axes)


def plot_cmc(curves: Mapping[str, Array], axes: Axes | None = None) -> Axes:
    """Identification rates over ranks, for results of `cmc`. Arguments as of `plot_roc`."""
    curves = _arrays_of(curves, "curves")
    axes = checked_axes(axes, "axes")
    for name, rates in curves.items():
        axes.plot(range(1, len(rates) + 1), rates, marker="o", markersize=3, label=name)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="rank", ylabel="identification rate")
    return _finish(axes)


def plot_class_size(
    accuracies: Mapping[str, Array],
    train_counts: Array,
    axes: Axes | None = None,
) -> Axes:
    """Mean accuracy of classes of similar size over their number of training images.

    Groups of sizes begin at powers of two.

    Args:
        accuracies: by name, [C], of `class_accuracy`; NaN counts for nothing.
        train_counts: integers [C].
        axes: as of `plot_roc`.
    """
    counts = integers(train_counts, "train_counts").cpu()
    edges = [1 << power for power in range(int(counts.max()).bit_length() if len(counts) else 0)]
    group = torch.bucketize(counts, counts.new_tensor(edges), right=True) - 1
    accuracies = _arrays_of(accuracies, "accuracies", len(counts))
    axes = checked_axes(axes, "axes")
    for name, values in accuracies.items():
        sizes, means = [], []
        for number in range(len(edges)):
            inside = (group == number) & ~values.isnan()
            if inside.any():
                sizes.append(float(counts[inside].double().mean()))
                means.append(float(values[inside].mean()))
        axes.plot(sizes, means, marker="o", markersize=3, label=name)
    axes.set(xscale="log", xlabel="training images of the class", ylabel="accuracy", ylim=(0, 1.01))
    return _finish(axes)


def _checked_mapping(values: Mapping[str, object], name: str) -> Mapping[str, object]:
    if not isinstance(values, Mapping):
        raise TypeError(f"{name}: expected a mapping from names, got {type(values).__name__}")
    return values


def _arrays_of(
    values: Mapping[str, Array], name: str, length: int | None = None
) -> dict[str, Tensor]:
    """float64 [length] each, on the CPU."""
    found = {}
    for key, each in _checked_mapping(values, name).items():
        each = as_tensor(each, f"{name}[{key!r}]")
        if each.dtype not in FLOATING:
            raise TypeError(f"{name}[{key!r}]: expected a floating dtype, got {each.dtype}")
        if each.ndim != 1 or (length is not None and len(each) != length):
            wanted = "n" if length is None else length
            raise ValueError(f"{name}[{key!r}]: expected shape [{wanted}], got {list(each.shape)}")
        found[key] = each.double().cpu()
    return found


def _finish(axes: Axes) -> Axes:
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
    return axes
