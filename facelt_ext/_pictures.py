"""Axes for pictures, which need matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def new_axes() -> Axes:
    """On a figure of their own, which no window shows."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the picture needs matplotlib; pip install matplotlib") from error
    return Figure(figsize=(6.4, 4), dpi=150, layout="constrained").subplots()
