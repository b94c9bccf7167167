"""The section of the report on Aggregate-and-Disperse and its baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from facelt_ext.aggregation import SuperClasses

from .methods import HEAD_ONLY, METHODS, Method
from .tables import Figures, cell, table

# As the paper's Table 3 has them, in its order.
ROWS = {
    "softmax": "all identities (ABCD)",
    "head-only": "head only (AB)",
    "head-then-all": "head, then all (AB-ABCD)",
    "softmax+range": "Range Loss",
    "aggregate-disperse": "Aggregate-and-Disperse (Ours)",
    "arcface": "ArcFace",
    "arcface+aggregate-disperse": "ArcFace + Aggregate-and-Disperse (ArcFace+Ours)",
}
COLUMNS = {"tar": "VR @ FAR 1 %", "rank1": "rank-1"}


def groups_table(figures: Mapping[str, Sequence[Figures]]) -> str:
    """A line a method and the paper's kind of columns, all on unseen identities.

    Args:
        figures: for each method, by its title, the figures of every seed.
    """
    lines = [
        [row, *(cell([own[metric] for own in figures[METHODS[name].title]]) for metric in COLUMNS)]
        for name, row in ROWS.items()
        if METHODS[name].title in figures
    ]
    return table(["groups or method", *COLUMNS.values()], lines)


def section(
    minimums: Sequence[int],
    methods: Mapping[str, Method],
    figures: Mapping[str, Sequence[Figures]],
    super_classes: SuperClasses | None,
) -> str:
    """Empty without a method that tells head from tail.

    Args:
        minimums: images that identities of the head and of each tail group have at least.
        methods: by their titles.
        figures: for each title the figures of every seed.
        super_classes: of the first seed; None if no method needs any.
    """
    if not any(method.tells_head_from_tail for method in methods.values()):
        return ""
    return f"""
## Head and tail

The rows of the paper's Table 3 (Ma et al., Pattern Recognition 2020) that are trained here, with
its names in parentheses; unseen identities. The head are the identities with at least \
{minimums[0]} images.

{groups_table(figures)}

All have the same number of epochs and steps. Those of two phases start anew with the optimiser and
the schedule of the learning rate in the second. Unlike in the paper, whose batches are random, a
batch holds as many images of each of its identities, so that *all identities* is the paper's
*Resampling* too.
{_super_class_section(minimums, super_classes)}"""


def _super_class_section(minimums: Sequence[int], super_classes: SuperClasses | None) -> str:
    if super_classes is None:
        return ""
    return f"""
## Super classes

Which tail identities were put together for the first seed: k-means on the mean features of their
training images, each tail group by itself ({_ranges(minimums)}). A group gets so many super classes
that one holds about as many images as a head identity does on average. The features are those of
the network of the same seed that was trained on the head only ("{HEAD_ONLY.title}"); its training
comes on top of the epochs of Aggregate-and-Disperse. ArcFace + Aggregate-and-Disperse has ArcFace
over all identities beside both steps.

```
{super_classes.summary()}
```

![Faces of each super class](super_classes.png)

In parentheses: training images.

![Images per class before and after aggregation](super_class_sizes.png)
"""


def _ranges(minimums: Sequence[int]) -> str:
    """The numbers of images of each tail group."""
    ranges = []
    for below, least in zip(minimums, minimums[1:], strict=False):
        most = below - 1
        images = "image" if most == 1 else "images"
        ranges.append(f"{least} {images}" if least == most else f"{least} to {most} {images}")
    return ", ".join(ranges)
