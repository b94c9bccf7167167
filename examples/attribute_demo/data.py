"""The ORL faces with attributes, and folds without a person in common."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import torch
from face_demo.data import FaceImages
from torch import Tensor

# One line for each image. They are our own judgement by eye: glasses; beard or moustache; bald, at
# least in front; female; teeth that can be seen.
ANNOTATIONS = Path(__file__).with_name("orl_attributes.csv")


@dataclass(frozen=True)
class Attributes:
    """Which of the attributes each image has.

    Attributes:
        names: of the A attributes.
        values: int64 ``[N, A]``, 0 or 1.
    """

    names: list[str]
    values: Tensor

    def imbalance(self) -> Tensor:
        """How far the share of images with each attribute is from 50 %, in per cent, ``[A]``."""
        return (100 * self.values.double().mean(0) - 50).abs()


def read_attributes(faces: FaceImages) -> Attributes:
    """Of the ORL faces, in the order of ``faces``."""
    with ANNOTATIONS.open(newline="", encoding="utf-8") as file:
        header, *lines = csv.reader(file)
    found = {(person, int(image)): values for person, image, *values in lines}
    shots = torch.arange(len(faces.labels)) - torch.searchsorted(faces.labels, faces.labels)
    rows = [
        [int(value) for value in found[faces.names[label], shot + 1]]
        for label, shot in zip(faces.labels.tolist(), shots.tolist(), strict=True)
    ]
    return Attributes(header[2:], torch.tensor(rows))


def person_folds(people: Tensor, values: Tensor, count: int) -> Tensor:
    """The fold of each image, int64 ``[N]``; all images of a person are in one.

    Those with the rarest attribute are dealt out first, each to the fold that has the fewest images
    with it and, among such, the fewest images.
    """
    fold_of_person = torch.full((int(people.max()) + 1,), -1)
    rarest_first = values.sum(0).argsort(stable=True).tolist()
    owned = torch.zeros(len(fold_of_person), values.shape[1], dtype=torch.int64)
    owned.index_add_(0, people, values)
    sizes, totals = [0] * count, torch.zeros(count, values.shape[1], dtype=torch.int64)
    everyone = torch.ones(len(fold_of_person), dtype=torch.bool)
    for attribute, concerned in [
        *((a, owned[:, a] > 0) for a in rarest_first),
        (rarest_first[0], everyone),
    ]:
        for person in (concerned & (fold_of_person < 0)).nonzero()[:, 0].tolist():
            fold = min(range(count), key=lambda f: (int(totals[f, attribute]), sizes[f]))
            fold_of_person[person] = fold
            sizes[fold] += int((people == person).sum())
            totals[fold] += owned[person]
    return fold_of_person[people]


def balanced_accuracy(predicted: Tensor, values: Tensor) -> Tensor:
    """0.5 (tp / Np + tn / Nn) of each attribute, ``[A]``, for 0 or 1 ``[N, A]`` of both."""
    right = (predicted == values).double()
    return torch.stack(
        [right.mul(values == kind).sum(0) / (values == kind).sum(0) for kind in (0, 1)]
    ).mean(0)
