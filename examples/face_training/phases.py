"""What a phase sees and is made from, and whether that is possible."""

from __future__ import annotations

import torch
from face_demo.errors import DataError
from torch import nn

from facelt_ext.aggregation import split_classes

from .backbones import has_batch_norm
from .images import Faces
from .options import Options
from .recipes import Phase, Start
from .sampling import images_per_batch, make_batches


def seen(phase: Phase, faces: Faces) -> Faces:
    """The faces that the phase sees."""
    if not phase.head_only:
        return faces
    head = split_classes(faces.counts(), phase.minimums).head
    return faces.keep(torch.isin(faces.labels, head).nonzero()[:, 0])


def make_loss(phase: Phase, start: Start) -> nn.Module:
    """Raises a DataError where a number of the loss is out of range."""
    try:
        return phase.make_loss(start, **phase.loss)
    except (TypeError, ValueError) as error:
        raise DataError(f"--set {error}") from error


def check_phase(
    phase: Phase, faces: Faces, network: nn.Module, options: Options, ranks: int
) -> None:
    """That it can begin, before any phase is trained.

    Raises:
        DataError: faces or numbers do not suit it.
    """
    if phase.minimums:
        _check_groups(phase, faces)
    labels = seen(phase, faces).labels
    batches, _ = make_batches(phase.batches, labels, ranks, 0, options.seed)
    images = images_per_batch(batches)
    if images < 2 and has_batch_norm(network):
        raise DataError(
            "a batch of one image is too small for batch norm, which needs two: give larger "
            "batches with --set, or more images"
        )
    if not phase.aggregated:
        # Super classes are not known yet, and their losses have no numbers. Nothing is allocated.
        with torch.device("meta"):
            make_loss(phase, Start(int(labels.max()) + 1, options.embedding_size))


def _check_groups(phase: Phase, faces: Faces) -> None:
    try:
        groups = split_classes(faces.counts(), phase.minimums)
    except (TypeError, ValueError) as error:
        raise DataError(f"--set {error}") from None
    tail = sum(len(each) for each in groups.tails)
    if len(groups.head) < 2 or tail == 0:
        raise DataError(
            f"the recipe needs at least two identities of the head, with {phase.minimums[0]} "
            f"images or more, and one of the tail, with fewer: found {len(groups.head)} and "
            f"{tail}; choose other limits with --set minimums=..."
        )
