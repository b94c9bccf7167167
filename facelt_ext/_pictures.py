"""Axes for pictures, which need matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def checked_axes(axes: Axes | None, name: str) -> Axes:
    """Those given, or new ones."""
    if axes is None:
        return _new_axes()
    if not callable(getattr(axes, "plot", None)) or not hasattr(axes, "figure"):
        raise TypeError(f"{name}: expected matplotlib axes, got {type(axes).__name__}")
    return axes


def _new_axes() -> Axes:
    """On a figure of their own, which no window shows."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the picture needs matplotlib; pip install matplotlib") from error
    return Figure(figsize=(6.4, 4), dpi=150, layout="constrained").subplots()
