"""What aggregation makes: super classes of tail classes, and the label maps they give."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from facelt_ext._checks import (
    LARGEST_INTEGER,
    check_class_range,
    check_data,
    check_integer,
    check_integers,
    check_path,
)
from facelt_ext._super_classes_report import draw_sizes, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FORMAT = "facelt_ext.SuperClasses"
_VERSION = 1


@dataclass(frozen=True, eq=False, repr=False)
class SuperClasses:
    """Which classes are head, which are tail, and which super class each tail class belongs to.

    Three numberings meet here, all of them int64:

    - fine labels, [0, N): those of the data set;
    - coarse labels, [0, N_h + S): the head classes in the order of `head`, then the super classes.
      What a classifier learns in step I;
    - dispersed labels, [0, N): the head classes in the order of `head`, then the tail classes in
      the order of `tail`. What the dispersion softmax of step II takes.

    Args:
        head: integers [N_h], the fine labels of the head classes.
        tail: integers [N_t], those of the tail classes; `head` and `tail` together hold each of
            0 .. N - 1 once. Either may be empty.
        super_class: integers [N_t] in [0, S), the super class of each class in `tail`; none of the
            S is empty.
        counts: integers [N], the images of each fine label, or None.
        groups: integers [S], the tail group that each super class was made from (0, 1, ...).
            Default: one group.

    Attributes:
        head: int64 [N_h], on the CPU, as all of these; a copy, not to be written to.
        tail: int64 [N_t].
        super_class: int64 [N_t].
        counts: int64 [N] or None.
        groups: int64 [S].

    Raises:
        TypeError: an argument is not a tensor of integers.
        ValueError: a wrong shape, a class that is in both `head` and `tail`, in one of them twice,
            or in neither, an index out of range, an empty super class.
    """

    head: Tensor
    tail: Tensor
    super_class: Tensor
    counts: Tensor | None = None
    groups: Tensor | None = None

    def __post_init__(self) -> None:
        head, tail = _integers(self.head, "head"), _integers(self.tail, "tail")
        _check_partition(head, tail)
        super_class = _integers(self.super_class, "super_class", len(tail), "tail class")
        num_super_classes = _checked_super_classes(super_class)
        counts, groups = self.counts, self.groups
        if counts is not None:
            counts = _integers(counts, "counts", len(head) + len(tail), "class")
            _check_least(counts, "counts", 1)
            if counts.double().sum() > LARGEST_INTEGER:
                raise ValueError("counts: expected a sum of 64 bits, got a larger one")
        if groups is None:
            groups = torch.zeros(num_super_classes, dtype=torch.int64, device="cpu")
        groups = _integers(groups, "groups", num_super_classes, "super class")
        _check_least(groups, "groups", 0)
        checked = {"head": head, "tail": tail, "super_class": super_class}
        for name, value in {**checked, "counts": counts, "groups": groups}.items():
            object.__setattr__(self, name, value)

    @property
    def num_classes(self) -> int:
        """N = N_h + N_t."""
        return self.num_head + self.num_tail

    @property
    def num_head(self) -> int:
        """N_h."""
        return len(self.head)

    @property
    def num_tail(self) -> int:
        """N_t."""
        return len(self.tail)

    @property
    def num_super_classes(self) -> int:
        """S."""
        return len(self.groups)

    @property
    def num_coarse(self) -> int:
        """N_h + S, the classes of step I."""
        return self.num_head + self.num_super_classes

    def coarse_labels(self, labels: Tensor, *, ignore_index: int | None = -100) -> Tensor:
        """Coarse labels of fine labels.

        Args:
            labels: fine labels, integers of any shape on any device; checking them waits for the
                device.
            ignore_index: a label outside [0, N) that is passed through; None: there is none.

        Returns:
            int64, of the shape and on the device of `labels`, in [0, N_h + S).

        Raises:
            TypeError: `labels` is not a tensor of integers.
            ValueError: a label out of range; `ignore_index` is a class.
        """
        return self._mapped(labels, self.num_head + self.super_class, ignore_index)

    def dispersed_labels(self, labels: Tensor, *, ignore_index: int | None = -100) -> Tensor:
        """Dispersed labels of fine labels; arguments and errors as in `coarse_labels`.

        Returns:
            int64, of the shape and on the device of `labels`, in [0, N).
        """
        numbers = torch.arange(self.num_head, self.num_classes, device="cpu")
        return self._mapped(labels, numbers, ignore_index)

    def members(self, super_class: int) -> Tensor:
        """Fine labels of the tail classes in a super class, int64, in the order of `tail`."""
        super_class = check_integer(super_class, "super_class")
        if not 0 <= super_class < self.num_super_classes:
            raise ValueError(
                f"super_class: expected a number in [0, {self.num_super_classes}), "
                f"got {super_class}"
            )
        return self.tail[self.super_class == super_class]

    def summary(self) -> str:
        """A text table in the shape of the paper's Table 1, a row per group and one for all.

        Columns: classes, their percentage of all classes, super classes; where `counts` is known
        also images, their percentage, images per class and per super class as "mean [least, most]".
        Groups without classes are left out.
        """
        return table(self)

    def plot_sizes(self, ax: Axes | None = None) -> Axes:
        """A histogram of images per class before (fine) and after aggregation (coarse).

        Bars are for 1 image, 2 to 3, 4 to 7, and so on: a logarithmic axis.

        Args:
            ax: matplotlib axes to draw into. Default: those of a new figure, 6.4 x 4 inches.

        Returns:
            The axes; `plot_sizes().figure.savefig(path)` writes a picture.

        Raises:
            ImportError: there is no matplotlib.
            ValueError: `counts` is None.
        """
        return draw_sizes(self, ax)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes all of it to a file that `load` reads."""
        content = {name: getattr(self, name) for name in self.__dataclass_fields__}
        torch.save({"format": _FORMAT, "version": _VERSION, **content}, check_path(path, "path"))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SuperClasses:
        """Reads what `save` wrote; runs no code from the file.

        Raises:
            OSError: the file cannot be read.
            ValueError: it holds no super classes, is damaged, or of another version.
        """
        name = check_path(path, "path")
        try:
            content = torch.load(name, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:
            raise ValueError(f"path: expected a file of super classes, got {name}") from error
        if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
            raise ValueError(
                f"path: expected a file of super classes, got something else in {name}"
            )
        if (version := content.pop("version", None)) != _VERSION:
            raise ValueError(f"path: expected version {_VERSION}, got {version} in {name}")
        missing = [entry for entry in cls.__dataclass_fields__ if entry not in content]
        if missing:
            raise ValueError(f"path: {name} is damaged: no {missing[0]}")
        for entry, value in content.items():
            # Anything else was rounded or made by something else.
            if isinstance(value, Tensor) and value.dtype != torch.int64:
                raise ValueError(
                    f"path: {name} is damaged: {entry}: expected torch.int64, got {value.dtype}"
                )
        try:
            return cls(**content)
        except (TypeError, ValueError) as error:
            raise ValueError(f"path: {name} is damaged: {error}") from error

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SuperClasses):
            return NotImplemented
        if (self.counts is None) != (other.counts is None):
            return False
        names = [name for name in self.__dataclass_fields__ if getattr(self, name) is not None]
        return all(torch.equal(getattr(self, name), getattr(other, name)) for name in names)

    def __repr__(self) -> str:
        return (
            f"SuperClasses(num_head={self.num_head}, num_tail={self.num_tail}, "
            f"num_super_classes={self.num_super_classes})"
        )

    def _mapped(self, labels: Tensor, tail_labels: Tensor, ignore_index: int | None) -> Tensor:
        labels = check_integers(check_data(labels, "labels"), "labels")
        ignored = torch.zeros_like(labels, dtype=torch.bool)
        if ignore_index is not None:
            ignore_index = check_integer(ignore_index, "ignore_index")
            if 0 <= ignore_index < self.num_classes:
                raise ValueError(
                    f"ignore_index: expected a number outside [0, {self.num_classes}), "
                    f"the classes, got {ignore_index}"
                )
            ignored = labels == ignore_index
        check_class_range(labels.reshape(-1), "labels", self.num_classes, ignore_index)
        table = torch.empty(self.num_classes, dtype=torch.int64, device="cpu")
        table[self.head] = torch.arange(self.num_head, device="cpu")
        table[self.tail] = tail_labels
        mapped = table.to(labels.device)[labels.masked_fill(ignored, 0)]
        return torch.where(ignored, labels, mapped)


def _integers(
    value: Tensor, name: str, length: int | None = None, one_per: str | None = None
) -> Tensor:
    """A copy of `value` on the CPU, int64 [length]."""
    value = check_integers(check_data(value, name), name)
    if value.ndim != 1:
        raise ValueError(f"{name}: expected one dimension, got shape {list(value.shape)}")
    if length is not None and len(value) != length:
        raise ValueError(
            f"{name}: expected shape [{length}], one for each {one_per}, got [{len(value)}]"
        )
    return value.to("cpu", copy=True)


def _check_least(value: Tensor, name: str, minimum: int) -> None:
    if (value < minimum).any():
        position = int((value < minimum).nonzero()[0])
        raise ValueError(
            f"{name}: expected numbers of at least {minimum}, got {int(value[position])} "
            f"at position {position}"
        )


def _check_partition(head: Tensor, tail: Tensor) -> None:
    """`head` and `tail` hold each of 0 .. N - 1 once; N is their length."""
    both = torch.cat([head, tail])
    classes = len(both)
    if classes == 0:
        raise ValueError("head and tail: expected at least one class, got none")
    in_range = both[(both >= 0) & (both < classes)]
    occurrences = in_range.bincount(minlength=classes)
    if (occurrences == 1).all():
        return
    missing = int((occurrences == 0).nonzero()[0])
    wanted = f"expected each of 0 .. {classes - 1} once, as they hold {classes} classes"
    if len(in_range) < classes:
        outside = both[(both < 0) | (both >= classes)]
        got = f"class {int(outside[0])}"
    else:
        twice = int((occurrences > 1).nonzero()[0])
        overlap = (head == twice).any() and (tail == twice).any()
        got = f"class {twice} {'in both' if overlap else 'more than once'}"
    raise ValueError(f"head and tail: {wanted}, got {got} and class {missing} in neither")


def _checked_super_classes(super_class: Tensor) -> int:
    """How many there are, none of them empty."""
    _check_least(super_class, "super_class", 0)
    if len(super_class) == 0:
        return 0
    largest = int(super_class.max())
    # Before the sizes are counted: a stray large number must not ask for as much memory.
    if largest >= len(super_class):
        raise ValueError(
            f"super_class: expected numbers in [0, {len(super_class)}), as there are "
            f"{len(super_class)} tail classes, got {largest}"
        )
    empty = super_class.bincount().eq(0).nonzero().flatten()
    if len(empty):
        raise ValueError(
            f"super_class: expected a tail class in each of the super classes 0 .. {largest}, got "
            f"none in {int(empty[0])}"
        )
    return largest + 1
