"""The tables of a comparison of methods, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

Figures = dict[str, float | None]

METRICS = {
    "accuracy": "unseen: accuracy",
    "tar": "unseen: TAR",
    "rank1": "unseen: rank-1",
    "rank1_head": "head: rank-1",
    "rank1_tail": "tail: rank-1",
    "tar_head": "head: TAR",
    "tar_tail": "tail: TAR",
}


def summarise(values: Sequence[float | None]) -> dict[str, float] | None:
    """Mean and sample standard deviation (0 for a single value); None if a value is missing."""
    present = [value for value in values if value is not None]
    if len(present) < len(values):
        return None
    return {"mean": fmean(present), "std": stdev(present) if len(present) > 1 else 0.0}


def differences(
    first: Sequence[Figures], second: Sequence[Figures], metric: str
) -> list[float | None]:
    """``second - first`` of one metric, seed by seed."""
    pairs = [(a[metric], b[metric]) for a, b in zip(first, second, strict=True)]
    return [None if a is None or b is None else b - a for a, b in pairs]


def markdown_tables(figures: Mapping[str, Sequence[Figures]]) -> str:
    """A line a method and a column a metric; then the same for differences from the first method.

    Args:
        figures: for each method the figures of every seed, in the same order.
    """
    (baseline, first), *others = figures.items()
    rows = [
        [method, *(cell([own[metric] for own in seeds]) for metric in METRICS)]
        for method, seeds in figures.items()
    ]
    difference_rows = [
        [method, *(cell(differences(first, seeds, metric), sign="+") for metric in METRICS)]
        for method, seeds in others
    ]
    return (
        f"{table(['%', *METRICS.values()], rows)}\n\n"
        f"{table([f'minus {baseline}', *METRICS.values()], difference_rows)}"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(_table_line(row, widths) for row in [header, rule, *rows])


def cell(values: Sequence[float | None], sign: str = "") -> str:
    """Mean and standard deviation in per cent; ``n/a`` where a value is missing."""
    summary = summarise(values)
    if summary is None:
        return "n/a"
    mean = f"{100 * summary['mean']:{sign}.1f}"
    return f"{mean} ± {100 * summary['std']:.1f}" if len(values) > 1 else mean


def _table_line(cells: Sequence[str], widths: Sequence[int]) -> str:
    aligned = [cells[0].ljust(widths[0])]
    aligned += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return f"| {' | '.join(aligned)} |"
