"""Images that were there at the start and cannot be read any more."""

from __future__ import annotations

import torch
from face_demo.errors import DataError
from face_demo.folders import printable
from torch import Tensor
from tqdm import tqdm

from .sources import Images

_NEVER, _REPLACED, _MISSING, _BACK = range(4)


class LostImages:
    """Which images were lost, in memory that the workers of a DataLoader share.

    Args:
        images: all of them.
        count: how many of them are items.
        replace: whether another image of the same identity takes the place of a lost one.
    """

    def __init__(self, images: Images, count: int, replace: bool) -> None:
        self.images, self.count, self.replace = images, count, replace
        self._states = torch.zeros(len(images), dtype=torch.uint8).share_memory_()

    def lose(self, row: int, message: str, replaced: bool) -> None:
        """Names the image, once.

        Raises:
            DataError: most images are lost.
        """
        first = self._states[row] == _NEVER
        self._states[row] = _REPLACED if replaced else _MISSING
        if first:
            tqdm.write(printable(message))
            lost = int((self._states != _NEVER).sum())
            if 2 * lost > self.count:
                raise DataError(
                    f"{lost} of {self.count} images cannot be read any more, the last is "
                    f"{printable(self.images.name(row))}; is the disk there?"
                )

    def find(self, row: int) -> None:
        """The image can be read, again or still."""
        if self._states[row] != _NEVER:
            self._states[row] = _BACK

    def missing(self, rows: Tensor) -> Tensor:
        """bool, for each row whether nothing could be read in its place."""
        return self._states[rows] == _MISSING

    def names(self) -> list[str]:
        """Of the images that were lost at any time."""
        rows = (self._states != _NEVER).nonzero()[:, 0].tolist()
        return [printable(self.images.name(row)) for row in rows]
