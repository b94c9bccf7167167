"""What tests of the demo on faces share; without the demo extra they are skipped."""

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

Image = pytest.importorskip("PIL.Image", reason="needs the demo extra")
for extra in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(extra, reason="needs the demo extra")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import attributes  # noqa: E402
import faces as demo  # noqa: E402
from attribute_demo import clusters as attribute_clusters  # noqa: E402
from attribute_demo import data as attribute_data  # noqa: E402
from attribute_demo import model as attribute_model  # noqa: E402
from attribute_demo import report as attribute_report  # noqa: E402
from attribute_demo import training as attribute_training  # noqa: E402
from face_demo import (  # noqa: E402
    aggregation_plots,
    aggregation_report,
    data,
    losses,
    methods,
    metrics,
    model,
    page,
    report,
    tables,
    training,
)

__all__ = [
    "Image",
    "aggregation_plots",
    "aggregation_report",
    "attribute_clusters",
    "attribute_data",
    "attribute_model",
    "attribute_report",
    "attribute_training",
    "attributes",
    "course",
    "data",
    "demo",
    "losses",
    "methods",
    "metrics",
    "model",
    "page",
    "report",
    "tables",
    "train",
    "training",
    "write_people",
]


def write_people(folder: Path, counts: Mapping[str, int]) -> Path:
    """A folder of images of various formats, as many of each identity as ``counts`` says."""
    generator = np.random.default_rng(0)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        face = generator.integers(0, 256, (60, 50, 3))
        for shot in range(count):
            noisy = (face + generator.integers(-20, 20, face.shape)).clip(0, 255).astype(np.uint8)
            suffix = ("png", "jpg", "bmp", "png")[shot % 4]
            Image.fromarray(noisy).save(folder / name / f"{shot}.{suffix}")
    return folder


def course(split: data.LongTailSplit, epochs: int, seed: int = 0) -> training.Course:
    progress = training.tqdm(disable=True)
    return training.Course(split, epochs, seed, torch.device("cpu"), progress)


def train(split: data.LongTailSplit, method: methods.Method, epochs: int) -> training.Trained:
    return course(split, epochs).train(method)
