"""A trunk with a head for each attribute, and the losses over them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from face_demo.model import FaceNet
from torch import Tensor, nn

HEAD_SIZE = 32


class AttributeNet(nn.Module):
    """The convolutions of `FaceNet`, and for each attribute a feature and a logit made of it.

    ``forward`` takes ``[B, 1, 56, 46]`` and returns features ``[A, B, 32]`` and logits ``[B, A]``.
    """

    def __init__(self, attributes: int) -> None:
        super().__init__()
        network = FaceNet()
        self.convolutions = network.convolutions
        flat = network.embedding.in_features
        self.heads = nn.ModuleList(nn.Linear(flat, HEAD_SIZE) for _ in range(attributes))
        self.classifiers = nn.ModuleList(nn.Linear(HEAD_SIZE, 1) for _ in range(attributes))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        images = images.contiguous(memory_format=torch.channels_last)
        flat = self.convolutions(images).flatten(1)
        features = torch.stack([head(flat) for head in self.heads])
        logits = [c(f.relu()) for c, f in zip(self.classifiers, features, strict=True)]
        return features, torch.cat(logits, dim=1)


def inverse_frequency(values: Tensor) -> Tensor:
    """B / (C n) for the n of B samples that have a value, of which there are C; ``[B]``."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    return len(values) / (len(counts) * counts[inverse])


def cross_entropy(logits: Tensor, values: Tensor, cost_sensitive: bool) -> Tensor:
    """The mean over samples and attributes, ``[B, A]`` both; cost-sensitive: each attribute's
    samples weigh by the inverse frequency of what they have."""
    weights = None
    if cost_sensitive:
        weights = torch.stack([inverse_frequency(column) for column in values.T], dim=1)
    return F.binary_cross_entropy_with_logits(logits, values.float(), weights)
