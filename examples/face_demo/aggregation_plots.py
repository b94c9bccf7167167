"""The pictures of super classes, as PNG files."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from facelt_ext.aggregation import SuperClasses

from .data import LongTailSplit
from .files import save
from .plots import STYLE

MAX_ROWS = 12
MAX_FACES = 10


def plot_super_classes(super_classes: SuperClasses, split: LongTailSplit, path: Path) -> None:
    """A row a super class, with a face of each of its identities and how many images that has.

    At most twelve super classes and ten of their identities are shown.
    """
    members = [
        super_classes.members(number).tolist()
        for number in range(min(super_classes.num_super_classes, MAX_ROWS))
    ]
    columns = min(max(map(len, members)), MAX_FACES)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(max(1.4 + 0.85 * columns, 4.2), 1.2 * len(members)))
        rows = figure.subplots(
            len(members), 1 + columns, squeeze=False, width_ratios=[1.4, *[0.85] * columns]
        )
        for axes in rows.flatten():
            axes.set_axis_off()
        for number, (labels, (title, *faces)) in enumerate(zip(members, rows, strict=True)):
            _describe(title, super_classes, number, labels, split)
            for axes, label in zip(faces, labels, strict=False):
                _show_face(axes, label, split)
        save(figure, path)


def _describe(
    axes: Axes, super_classes: SuperClasses, number: int, labels: list[int], split: LongTailSplit
) -> None:
    lines = [
        f"tail group {int(super_classes.groups[number]) + 1}",
        _count(len(labels), "identity", "identities"),
        _count(int(split.train_counts[labels].sum()), "image", "images"),
    ]
    if len(labels) > MAX_FACES:
        lines.append(f"{MAX_FACES} of them shown")
    axes.text(0, 0.72, f"super class {number + 1}", weight="bold", va="bottom")
    axes.text(0, 0.66, "\n".join(lines), va="top", fontsize="small", linespacing=1.4)


def _show_face(axes: Axes, label: int, split: LongTailSplit) -> None:
    face = split.train_images[split.train_labels == label][0]
    axes.imshow(face.numpy(), cmap="gray", vmin=0, vmax=255)
    axes.set_title(
        f"{split.train_names[label]} ({int(split.train_counts[label])})", fontsize="small", pad=3
    )


def _count(number: int, one: str, several: str) -> str:
    return f"{number} {one if number == 1 else several}"


def plot_sizes(super_classes: SuperClasses, path: Path) -> None:
    """Images per class before and after aggregation."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6, 3.4))
        axes = super_classes.plot_sizes(figure.add_subplot())
        axes.grid(axis="x", visible=False)
        save(figure, path)
