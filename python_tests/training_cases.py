"""What tests of examples/train_faces.py share."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import train_faces  # noqa: E402
from face_demo import data as demo_data  # noqa: E402
from face_demo import folders  # noqa: E402
from face_demo.data import DataError  # noqa: E402
from face_training import (
    backbones,
    checkpoint,
    divergence,
    evaluation_sets,
    images,
    listing,
    pair_files,
    recipes,
    recordio,
    report,
    sampling,
    scans,
    settings,
    sources,
    trainer,
)  # noqa: E402
from face_training.checkpoint import CHECKPOINT  # noqa: E402

__all__ = [
    "CHECKPOINT",
    "DataError",
    "backbones",
    "checkpoint",
    "demo_data",
    "divergence",
    "evaluation_sets",
    "folders",
    "images",
    "listing",
    "pair_files",
    "recipes",
    "recordio",
    "report",
    "sampling",
    "scans",
    "settings",
    "sources",
    "train_faces",
    "trainer",
]

SMALL = ["--image-size", "16", "--embedding-size", "8", "--workers", "0", "--device", "cpu"]
# Batches of a few images, so that the 98 ORL faces make several.
SETTINGS = {
    "softmax": ["batch_size=32"],
    "range": ["classes_per_batch=8", "samples_per_class=4"],
    "cosface": ["batch_size=32"],
    "arcface": ["batch_size=32"],
    "domain-balancing": ["batch_size=32"],
    "aggregate-disperse": ["batch_size=32", "minimums=5,2,1"],
    "clmle": ["batch_size=32", "clusters_per_batch=6", "samples_per_cluster=4", "cluster_size=4"],
    "lmle": ["batch_size=32", "clusters_per_batch=6", "samples_per_cluster=4", "cluster_size=4"],
}


def shrink_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """One narrow block a stage."""
    monkeypatch.setitem(backbones._IRESNETS, "iresnet18", (1, 1, 1, 1))
    monkeypatch.setattr(backbones, "_WIDTHS", (8, 8, 16, 16))


def arguments(recipe: str, output: Path, *more: str) -> list[str]:
    """Of a short training on the ORL faces, four epochs a phase or so."""
    epochs = 4 * len(recipes.RECIPES[recipe].phases)
    return [
        *("--recipe", recipe, "--output", str(output), "--epochs", str(epochs)),
        *SMALL,
        *("--set", *SETTINGS[recipe]),
        *more,
    ]


def write_faces(folder: Path, counts: dict[str, int], size: int = 20) -> Path:
    """Images of noise around a colour of each identity's own."""
    generator = np.random.default_rng(0)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        colour = generator.integers(40, 216, 3)
        for number in range(1, count + 1):
            pixels = colour + generator.integers(-30, 31, (size, size, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(
                folder / name / f"{name}_{number:04d}.png"
            )
    return folder
