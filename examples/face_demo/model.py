"""A small face network, its input and its augmentation."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EMBEDDING_SIZE = 64


class FaceNet(nn.Module):
    """Three convolutions and one fully connected layer, whose output is the face's feature.

    ``forward`` takes ``[B, 1, 56, 46]`` and returns unnormalised features ``[B, 64]`` and, with a
    ``balancing`` module (a `facelt_ext.ResidualBalancingModule`), which they pass through at test
    time too, its gate ``[B]``; None without one.
    """

    def __init__(self, balancing: nn.Module | None = None) -> None:
        super().__init__()
        channels = [1, 16, 32, 64]
        self.convolutions = nn.Sequential(
            *(_convolution(a, b) for a, b in itertools.pairwise(channels))
        )
        self.embedding = nn.Linear(channels[-1] * 7 * 5, EMBEDDING_SIZE)
        self.balancing = balancing
        # Pooling on the CPU is several times faster in this memory format.
        self.convolutions.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        images = images.contiguous(memory_format=torch.channels_last)
        features = self.embedding(self.convolutions(images).flatten(1))
        return (features, None) if self.balancing is None else self.balancing(features)


def _convolution(channels_in: int, channels_out: int) -> nn.Sequential:
    """3x3 convolution that halves height and width; what follows the pooling has less to do."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1, bias=False),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )


def network_input(images: Tensor) -> Tensor:
    """uint8 ``[N, 112, 92]`` to float32 ``[N, 1, 56, 46]`` around zero."""
    return F.avg_pool2d((images[:, None].float() - 127.5) / 128, kernel_size=2)


def augment(images: Tensor) -> Tensor:
    """Mirrors half of the images and turns, scales and shifts each a little; same shape.

    Without it the repeated images of a poor identity would be equal and have no range.
    """
    size = len(images)
    uniform = torch.rand(4, size, device=images.device) * 2 - 1
    angle, scale = uniform[0] * math.radians(8), 1 + uniform[1] * 0.08
    mirror = torch.where(torch.rand(size, device=images.device) < 0.5, -1.0, 1.0)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    first_row = torch.stack([cos * mirror, -sin, uniform[2] * 0.08], dim=1)
    second_row = torch.stack([sin * mirror, cos, uniform[3] * 0.08], dim=1)
    grid = F.affine_grid(
        torch.stack([first_row, second_row], dim=1), list(images.shape), align_corners=False
    )
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


@torch.no_grad()
def embed(network: FaceNet, images: Tensor, batch_size: int = 256) -> Tensor:
    """L2-normalised features ``[N, 64]`` of network inputs, on the CPU, in evaluation mode."""
    network.eval()
    device = network.embedding.weight.device
    features = torch.cat([network(batch.to(device))[0] for batch in images.split(batch_size)])
    return F.normalize(features).cpu()
