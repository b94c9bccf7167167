"""Networks that turn faces into features."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from face_demo.errors import DataError
from torch import Tensor, nn

from facelt_ext import ResidualBalancingModule

# Blocks in each of the four stages.
_IRESNETS = {
    "iresnet18": (2, 2, 2, 2),
    "iresnet34": (3, 4, 6, 3),
    "iresnet50": (3, 4, 14, 3),
    "iresnet100": (3, 13, 30, 3),
}
_WIDTHS = (64, 128, 256, 512)


class IResNet(nn.Module):
    """The residual network of ArcFace (Deng et al., arXiv:1801.07698, section 3.2).

    Its blocks are batch norm, 3 x 3 convolution, batch norm, PReLU, 3 x 3 convolution and batch
    norm; the stem does not shrink the image, each stage halves it, and batch norm, a fully
    connected layer and batch norm give the feature.

    ``forward`` takes float32 ``[B, 3, size, size]`` and returns ``[B, embedding_size]``.
    """

    def __init__(self, blocks: tuple[int, ...], embedding_size: int, image_size: int) -> None:
        super().__init__()
        if image_size % 16 != 0:
            raise DataError(f"--image-size: expected a multiple of 16, got {image_size}")
        self.stem = nn.Sequential(_convolution(3, 64), nn.BatchNorm2d(64), nn.PReLU(64))
        stages, channels = [], 64
        for count, width in zip(blocks, _WIDTHS, strict=True):
            stages += [
                _Block(channels, width, 2),
                *(_Block(width, width, 1) for _ in range(count - 1)),
            ]
            channels = width
        self.stages = nn.Sequential(*stages)
        side = image_size // 16
        self.output = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.Flatten(),
            nn.Linear(channels * side * side, embedding_size),
            nn.BatchNorm1d(embedding_size),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.output(self.stages(self.stem(images)))


class _Block(nn.Module):
    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.BatchNorm2d(channels),
            _convolution(channels, width),
            nn.BatchNorm2d(width),
            nn.PReLU(width),
            _convolution(width, width, stride),
            nn.BatchNorm2d(width),
        )
        self.shortcut = nn.Identity()
        if stride != 1 or channels != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, images: Tensor) -> Tensor:
        return self.main(images) + self.shortcut(images)


def _convolution(channels: int, width: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)


class Embedder(nn.Module):
    """A backbone, from uint8 images to features.

    Pixels become ``(x - 127.5) / 128`` (Domain Balancing, section 4.1). With a balancing module,
    which the features pass through at test time too, `forward_with_gate` gives its gate as well.
    """

    def __init__(self, backbone: nn.Module, balancing: ResidualBalancingModule | None) -> None:
        super().__init__()
        self.backbone, self.balancing = backbone, balancing

    def forward(self, images: Tensor) -> Tensor:
        """uint8 ``[B, 3, size, size]`` to ``[B, embedding_size]``."""
        return self.forward_with_gate(images)[0]

    def forward_with_gate(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        features = self.backbone((images.float() - 127.5) / 128)
        return (features, None) if self.balancing is None else self.balancing(features)


def make_backbone(name: str, embedding_size: int, image_size: int) -> nn.Module:
    """A network with random weights.

    Args:
        name: iresnet18, iresnet34, iresnet50 or iresnet100; or a model of torchvision, as
            ``torchvision/resnet50``, or of timm, as ``timm/resnet50``.

    Raises:
        DataError: there is no such network, or its library is not installed; it cannot take such
            images.
    """
    if name in _IRESNETS:
        return IResNet(_IRESNETS[name], embedding_size, image_size)
    library, _, model = name.partition("/")
    if library not in ("torchvision", "timm") or not model:
        raise DataError(
            f"--backbone: expected {', '.join(_IRESNETS)}, torchvision/NAME or timm/NAME, got "
            f"{name!r}"
        )
    try:
        make = _maker(library)
    except Exception as error:  # A library that does not go with this PyTorch raises any kind.
        raise DataError(
            f"--backbone {name}: {library} cannot be imported ({error}): pip install {library}"
        ) from error
    try:
        backbone = make(model, num_classes=embedding_size)
        _try(backbone, embedding_size, image_size)
    except Exception as error:  # So do models.
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"--backbone {name}, images of {image_size} pixels: {reason}") from error
    return backbone


def _maker(library: str) -> Callable[..., nn.Module]:
    if library == "torchvision":
        from torchvision.models import get_model

        return partial(get_model, weights=None)
    from timm import create_model

    return partial(create_model, pretrained=False)


def _try(backbone: nn.Module, embedding_size: int, image_size: int) -> None:
    """Nothing of the backbone or of random numbers changes by it."""
    with torch.random.fork_rng(), torch.no_grad():
        images = torch.zeros(2, 3, image_size, image_size)
        features = copy.deepcopy(backbone).train()(images)
    if not isinstance(features, Tensor):
        raise ValueError(f"expected features, got a {type(features).__name__}")
    if features.shape != (2, embedding_size):
        raise ValueError(f"expected features [2, {embedding_size}], got {list(features.shape)}")


def has_batch_norm(network: nn.Module) -> bool:
    return any(isinstance(each, nn.modules.batchnorm._BatchNorm) for each in network.modules())
