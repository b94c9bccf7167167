"""Pictures of what the protocols give; they need matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from facelt_ext._pictures import new_axes
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
    axes = new_axes() if axes is None else axes
    if lowest_far is None:
        reached = [float(each.far[each.far > 0].min()) for each in curves.values()]
        lowest_far = min([0.1, *reached])
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
    axes = new_axes() if axes is None else axes
    for name, rates in curves.items():
        rates = as_tensor(rates, "curves").cpu()
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
    axes = new_axes() if axes is None else axes
    counts = integers(train_counts, "train_counts").cpu()
    edges = [1 << power for power in range(int(counts.max()).bit_length())]
    group = torch.bucketize(counts, torch.tensor(edges), right=True) - 1
    for name, values in accuracies.items():
        values = as_tensor(values, "accuracies").cpu()
        sizes, means = [], []
        for number in range(len(edges)):
            inside = (group == number) & ~values.isnan()
            if inside.any():
                sizes.append(float(counts[inside].double().mean()))
                means.append(float(values[inside].mean()))
        axes.plot(sizes, means, marker="o", markersize=3, label=name)
    axes.set(xscale="log", xlabel="training images of the class", ylabel="accuracy", ylim=(0, 1.01))
    return _finish(axes)


def _finish(axes: Axes) -> Axes:
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
    return axes
