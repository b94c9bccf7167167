"""The table and the picture of super classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from facelt_ext._pictures import checked_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from facelt_ext._super_classes import SuperClasses


def table(super_classes: SuperClasses) -> str:
    """See `SuperClasses.summary`."""
    everything = torch.arange(super_classes.num_classes, device="cpu")
    all_super_classes = torch.arange(super_classes.num_super_classes, device="cpu")
    parts = [("head", super_classes.head, None)] if super_classes.num_head else []
    for group in super_classes.groups.unique().tolist():
        in_group = super_classes.groups == group
        members = super_classes.tail[in_group[super_classes.super_class]]
        parts.append((f"tail {group + 1}", members, all_super_classes[in_group]))
    parts.append(("total", everything, all_super_classes))

    lines = [["group", "classes", "%", "super classes"]]
    for name, labels, chosen in parts:
        super_class_number = "-" if chosen is None else f"{len(chosen):,}"
        share = _percent(len(labels), len(everything))
        lines.append([name, f"{len(labels):,}", share, super_class_number])
    if super_classes.counts is not None:
        counts, sizes = super_classes.counts, images_per_super_class(super_classes)
        lines[0] += ["images", "%", "images per class", "images per super class"]
        for line, (_, labels, chosen) in zip(lines[1:], parts, strict=True):
            images = int(counts[labels].sum())
            line += [f"{images:,}", _percent(images, int(counts.sum())), _spread(counts[labels])]
            line += ["-" if chosen is None else _spread(sizes[chosen])]
    return _aligned(lines)


def images_per_super_class(super_classes: SuperClasses) -> Tensor:
    """int64 [S]."""
    sizes = torch.zeros_like(super_classes.groups)
    return sizes.index_add_(0, super_classes.super_class, super_classes.counts[super_classes.tail])


def draw_sizes(super_classes: SuperClasses, axes: Axes | None) -> Axes:
    """See `SuperClasses.plot_sizes`."""
    if super_classes.counts is None:
        raise ValueError("counts: expected the images of each class for a picture, got None")
    axes = checked_axes(axes, "ax")
    sizes = images_per_super_class(super_classes)
    fine = super_classes.counts
    coarse = torch.cat([fine[super_classes.head], sizes])
    bins = int(coarse.max()).bit_length()
    for shift, color, sample, when in (
        (-0.21, "#9fb1c4", fine, "before aggregation"),
        (0.21, "#c2410c", coarse, "after"),
    ):
        heights = _octaves(sample, bins)
        label = f"{when}: {len(sample):,} classes"
        axes.bar([x + shift for x in range(bins)], heights.tolist(), 0.42, color=color, label=label)
    axes.set_xticks(range(bins), [_octave_name(octave) for octave in range(bins)])
    if bins > 8:
        axes.tick_params(axis="x", labelrotation=30)
    axes.set(xlabel="images per class", ylabel="classes")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.grid(color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
    return axes


def _octaves(counts: Tensor, bins: int) -> Tensor:
    """How many of the counts are in [1, 2), [2, 4), [4, 8), ..."""
    octaves = counts.new_tensor([n.bit_length() - 1 for n in counts.tolist()])
    return octaves.bincount(minlength=bins)


def _octave_name(octave: int) -> str:
    least, most = 2**octave, 2 ** (octave + 1) - 1
    return str(least) if least == most else f"{least}\N{EN DASH}{most}"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}"


def _spread(counts: Tensor) -> str:
    """Mean and range."""
    if len(counts) == 0:
        return "-"
    return f"{counts.double().mean():,.1f} [{int(counts.min())}, {int(counts.max())}]"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
