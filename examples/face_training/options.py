"""How to train, apart from the recipe's numbers, and how far a training is."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

AMP_TYPES = {"none": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Options:
    """How to train, apart from the recipe's numbers.

    Attributes:
        recipe: its name.
        hold_out: share of the identities that are not trained on but evaluated on.
        backbone: of `make_backbone`.
        embedding_size, image_size: dimensions of the features; height and width of the images.
        schedule: "step", a tenth after each of a phase's milestones, or "cosine", to 0.
        weight_decay, clip_norm: of the optimiser; the largest norm of all gradients, 0 for any.
        amp: "none", "bfloat16" or "float16".
        seed: of weights, batches, mirroring and clusters.
        workers: processes that load images.
    """

    recipe: str = "arcface"
    hold_out: float = 0.0
    backbone: str = "iresnet18"
    embedding_size: int = 512
    image_size: int = 112
    schedule: str = "step"
    weight_decay: float = 5e-4
    clip_norm: float = 5.0
    amp: str = "none"
    seed: int = 0
    workers: int = 2


@dataclass
class Progress:
    """How far a training is, and what it has measured, epoch by epoch."""

    phase: int = 0
    epoch: int = 0
    step: int = 0
    loss: list[float] = field(default_factory=list)
    seconds_per_step: list[float] = field(default_factory=list)
    rate: list[float] = field(default_factory=list)
    figures: list[dict[str, dict[str, float]]] = field(default_factory=list)
