"""Cosines that are compared with each other, though they come from different products.

How a product rounds depends on where its rows lie, so that copies of one image score differently in
two products. Scores of blocks therefore only sort out what is far from a limit. What is near it is
computed anew, by products that do not round: see `parts`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from facelt_ext._rounding import product_dtype, product_error

# Scores of a block: rows and columns.
BLOCK_ROWS, BLOCK_COLUMNS = 1 << 10, 1 << 14
# Numbers of features that are gathered at a time: on the CPU so few that they stay in the caches.
GATHERED = {"cpu": 1 << 17, "cuda": 1 << 24}
# Where more than this part of a block is wanted exactly, all of it is computed so.
DENSE = 1 / 64
# A step of the first part of a feature is this power of 2, and one of the second, times the square
# root of the dimensions, the other.
COARSE, FINE = -26, -54

Parts = Sequence[Tensor]


@dataclass(frozen=True)
class Block:
    """Some rows, from `top` on, and some columns, from `left` on, both unit features."""

    top: int
    left: int
    rows: Tensor
    columns: Tensor

    @property
    def part(self) -> slice:
        """Of the rows."""
        return slice(self.top, self.top + len(self.rows))

    @functools.cached_property
    def scores(self) -> Tensor:
        """[r, c], each within `error` of what `exact` gives."""
        return self.rows @ self.columns.t()

    @property
    def error(self) -> float:
        # `parts` leave out half as much.
        return 1.5 * product_error(self.rows)

    def is_few(self, mask: Tensor) -> bool:
        """Whether so few of the block's scores are meant that others need not be computed too."""
        return int(mask.count_nonzero()) < DENSE * len(self.rows) * len(self.columns)

    def exact(self, row: Tensor, column: Tensor) -> Tensor:
        """float64 [n], the cosines of rows and columns of the block."""
        return exact_cosines(self.rows, self.columns, row, column)

    def all_exact(self) -> Tensor:
        """float64 [r, c]."""
        return product(parts(self.rows), parts(self.columns))


def parts(features: Tensor) -> Parts:
    """float64 tensors whose sum is the unit features, the second of float64 features only.

    The first has multiples of 2^-26. Sums of their products are multiples of 2^-52 below 2, all of
    which float64 holds: they have the same bits in whatever order they are added up. So have
    products of the first with the second: steps are so many that sums have 53 bits.
    """
    wide = features.double()
    coarse = _multiples(wide, COARSE)
    if features.dtype != torch.float64:
        return (coarse,)
    fine = FINE + math.ceil(math.log2(features.shape[1]) / 2)
    return coarse, _multiples(wide - coarse, fine)


def _multiples(numbers: Tensor, exponent: int) -> Tensor:
    """Rounded to multiples of this power of 2."""
    return (numbers * 2.0**-exponent).round_().mul_(2.0**exponent)


def product(rows: Parts, columns: Parts) -> Tensor:
    """float64 [r, c], the cosines of all rows with all columns."""
    cosines = rows[0] @ columns[0].t()
    if len(rows) > 1:
        cosines += rows[0] @ columns[1].t() + rows[1] @ columns[0].t()
    return cosines.clamp_(-1, 1)


def exact_cosines(rows: Tensor, columns: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """float64 [n], of pairs of unit features."""
    size = max(1, GATHERED["cuda" if rows.is_cuda else "cpu"] // rows.shape[1])
    pairs = zip(row.split(size), column.split(size), strict=True)
    return torch.cat([_row_products(parts(rows[a]), parts(columns[b])) for a, b in pairs])


def _row_products(rows: Parts, columns: Parts) -> Tensor:
    cosines = (rows[0] * columns[0]).sum(1)
    if len(rows) > 1:
        cosines += (rows[0] * columns[1]).sum(1) + (rows[1] * columns[0]).sum(1)
    return cosines.clamp_(-1, 1)


def blocks(rows: Tensor, columns: Tensor) -> Iterator[Block]:
    """All unit rows with all unit columns, which may lie on another device."""
    dtype = product_dtype(rows)
    for left in range(0, len(columns), BLOCK_COLUMNS):
        right_side = columns[left : left + BLOCK_COLUMNS].to(rows.device, dtype)
        for top in range(0, len(rows), BLOCK_ROWS):
            left_side = rows[top : top + BLOCK_ROWS].to(dtype)
            yield Block(top, left, left_side, right_side)


def raise_to_best(best: Tensor, block: Block, among: Tensor | None = None) -> None:
    """Raises `best`, float64 [rows], where a score of the block is higher.

    Args:
        among: bool [r, c], which scores count; all by default.
    """
    best = best[block.part]
    if among is None or not block.is_few(among):
        scores = block.scores
        if among is not None:
            scores = scores.masked_fill(~among, -torch.inf)
        highest = scores.amax(1)
        least = torch.maximum(highest.double(), best) - 2 * block.error
        least = least.where(highest > -torch.inf, torch.inf).to(scores.dtype)
        among = scores >= least[:, None]
    if block.is_few(among):
        row, column = among.nonzero(as_tuple=True)
        best.scatter_reduce_(0, row, block.exact(row, column), "amax")
    else:
        exact = block.all_exact().masked_fill_(~among, -torch.inf)
        torch.maximum(best, exact.amax(1), out=best)


def count_reaching(block: Block, limits: Tensor, among: Tensor | None = None) -> Tensor:
    """int64 [r], how many scores of each row are at least its limit, float64 [r].

    Args:
        among: as of `raise_to_best`.
    """
    low, high = _around(limits, block)
    reached = block.scores >= low[:, None]
    if among is not None:
        reached &= among
    if block.is_few(reached):
        row, column = reached.nonzero(as_tuple=True)
        sure = block.scores[row, column] >= high[row]
        rest = row[~sure]
        late = rest[block.exact(rest, column[~sure]) >= limits[rest]]
        return torch.cat([row[sure], late]).bincount(minlength=len(limits))
    doubtful = reached & (block.scores < high[:, None])
    if block.is_few(doubtful):
        row, column = doubtful.nonzero(as_tuple=True)
        reached[row, column] = block.exact(row, column) >= limits[row]
    else:
        reached &= block.all_exact() >= limits[:, None]
    # As bytes, which add up twice as fast as bools.
    return reached.view(torch.uint8).sum(1)


def count_reaching_each(block: Block, limits: Tensor) -> Tensor:
    """int64 [r, m], how many scores of each row are at least each of its limits.

    Args:
        limits: float64 [r, m], each row ascending.
    """
    rows, width = limits.shape
    (low, high), values = _around(limits, block), block.scores
    row = torch.arange(rows, device=values.device)[:, None]
    column = torch.arange(values.shape[1], device=values.device)
    candidates = values >= low[:, :1]
    if block.is_few(candidates):
        row, column = (each[:, None] for each in candidates.nonzero(as_tuple=True))
        values, low, high = values[row, column], low[row[:, 0]], high[row[:, 0]]
    reached = torch.searchsorted(low, values, right=True)
    # Of the limits that a score may have reached, the highest is in doubt if any is.
    high = torch.cat([torch.full_like(high[:, :1], -torch.inf), high], dim=1)
    doubtful = values < high.gather(1, reached)
    if not block.is_few(doubtful):
        reached = torch.searchsorted(limits, block.all_exact(), right=True)
    elif doubtful.any():
        rows_in_doubt, columns = (each.expand_as(doubtful)[doubtful] for each in (row, column))
        exact = block.exact(rows_in_doubt, columns)[:, None]
        reached[doubtful] = torch.searchsorted(limits[rows_in_doubt], exact, right=True)[:, 0]
    number = reached.add_(row * (width + 1)).flatten()
    counts = number.bincount(minlength=rows * (width + 1)).view(rows, width + 1)
    return counts.flip(1).cumsum(1).flip(1)[:, 1:]


def _around(limits: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """Below the first no score of the block reaches the limit, from the second on all do."""
    dtype = block.scores.dtype
    return (limits - block.error).to(dtype), (limits + block.error).to(dtype)
