"""Trains a head for 50 steps: the loss has to fall, and resident memory to stay what it is.

    python -m benchmarks.steady_memory [cosface | domain_balancing]

85,164 classes, of which a few hundred appear: features are their centres on the sphere with noise,
passed through a linear map that is trained too. It ends with 1 if the loss has not fallen to
half, or if memory has grown by more than 16 MiB after the warm-up.
"""

from __future__ import annotations

import argparse
import sys

import psutil
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.cases import THREADS
from facelt_ext import CosFaceLoss, DomainBalancingLoss

HEADS = {"cosface": CosFaceLoss, "domain_balancing": DomainBalancingLoss}
CLASSES, SEEN, BATCH, DIMENSIONS = 85_164, 300, 256, 512
NOISE = 1.0
STEPS, WARM_UP, EVERY = 50, 10, 10
LEARNING_RATE, MOMENTUM = 0.02, 0.9
LOSS_LEFT = 0.5
TOLERANCE = 16 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("head", nargs="?", default="cosface", choices=HEADS)
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    losses, resident = train(HEADS[parser.parse_args().head](CLASSES, DIMENSIONS))
    growth = max(resident[WARM_UP:]) - resident[WARM_UP - 1]
    shown = [0, *range(EVERY - 1, STEPS, EVERY)]
    rows = [(step + 1, losses[step], resident[step] / 2**20) for step in shown]
    print(tabulate(rows, ["step", "loss", "resident MiB"], floatfmt=".2f"))
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    print(f"resident memory grew by {growth / 2**20:.1f} MiB after step {WARM_UP}")
    sys.exit(losses[-1] > LOSS_LEFT * losses[0] or growth > TOLERANCE)


def train(head: nn.Module) -> tuple[list[float], list[int]]:
    """The loss and the resident memory of each step."""
    embedding = nn.Linear(DIMENSIONS, DIMENSIONS, bias=False)
    parameters = [*embedding.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, LEARNING_RATE, MOMENTUM)
    centres = F.normalize(torch.randn(SEEN, DIMENSIONS))
    seen = torch.randperm(CLASSES)[:SEEN]
    process = psutil.Process()
    losses, resident = [], []
    progress = tqdm(range(STEPS), unit="step")
    for _ in progress:
        features, labels = batch(centres, seen)
        loss = head(embedding(features), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        resident.append(process.memory_info().rss)
        progress.set_postfix(loss=f"{losses[-1]:.2f}", MiB=resident[-1] >> 20)
    return losses, resident


def batch(centres: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    members = torch.randint(len(centres), (BATCH,))
    noise = torch.randn(BATCH, DIMENSIONS) * NOISE / DIMENSIONS**0.5
    return centres[members] + noise, seen[members]


if __name__ == "__main__":
    main()
