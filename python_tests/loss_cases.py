"""A right call of each loss, for tests over all of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from facelt_ext import losses
from facelt_ext.aggregation import SuperClasses

CLASSES, SIZE, BATCH = 60, 8, 16
ORDER = torch.randperm(CLASSES, generator=torch.Generator().manual_seed(0))
SETS = SuperClasses(ORDER[:20], ORDER[20:], torch.arange(40) % 8)
OTHER_SETS = SuperClasses(ORDER[:20].flip(0), ORDER[20:], torch.arange(40) * 3 % 8)
MARGINS = torch.linspace(0.1, 0.5, CLASSES)

SIZES = {"num_classes": CLASSES, "embedding_size": SIZE}
# Right arguments by loss; of several sets the first is the one with most in its state.
ARGUMENTS: dict[str, list[dict[str, object]]] = {
    "AggregatedSoftmaxLoss": [{**SIZES, "super_classes": SETS}],
    "ArcFaceLoss": [{**SIZES, "margin": MARGINS}, {**SIZES, "margin": 0.3, "scale": 16.0}],
    "CLMLELoss": [{"between_margin": 0.5, "within_margin": 0.25, "samples_per_cluster": 2}],
    "CosFaceLoss": [{**SIZES, "margin": MARGINS}, {**SIZES, "margin": 0.25, "scale": 16.0}],
    "DispersionLoss": [{**SIZES, "super_classes": SETS}],
    "DomainBalancingLoss": [
        {**SIZES, "margin": MARGINS, "scale": 16.0, "k": 5, "epsilon": "auto"},
        {**SIZES, "margin": 0.25, "k": 3, "epsilon": 5.0, "rbm_weight": 0.5, "scale": 16.0},
    ],
    "LMLELoss": [{"margins": (0.5, 0.25, 1.0), "samples_per_cluster": 2}],
    "RangeLoss": [{"k": 2, "margin": 16.0, "alpha": 1.0, "beta": 0.5}],
    "SphereFaceLoss": [{**SIZES, "margin": 3, "scale": 2.0}],
}
# What a checkpoint of each holds, which those of users do already.
STATE = {
    "AggregatedSoftmaxLoss": ["weight", "label_map"],
    "ArcFaceLoss": ["weight", "margin"],
    "CosFaceLoss": ["weight", "margin"],
    "DispersionLoss": ["weight", "label_map", "super_class.index"],
    "DomainBalancingLoss": ["weight", "compactness", "margin", "cursor"],
    "SphereFaceLoss": ["weight"],
}
LOSSES = sorted(
    name
    for name, value in vars(losses).items()
    if inspect.isclass(value) and issubclass(value, nn.Module) and name.endswith("Loss")
)
HEADS = sorted(name for name in LOSSES if "num_classes" in ARGUMENTS[name][0])


def make(name: str, **changes: object) -> nn.Module:
    """The loss with most in its state; the same weight each time."""
    arguments = {**ARGUMENTS[name][0], **changes}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(losses, name)(**arguments)


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Clusters of two samples; of a class or two more in each batch."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(BATCH, SIZE, generator=generator)
    labels = torch.randint(CLASSES, (BATCH // 2,), generator=generator).repeat_interleave(2)
    return features, labels


def train(loss: nn.Module, steps: int, moving: bool = False) -> None:
    """Calls in training; with `moving` the weight is another one after each."""
    loss.train()
    for seed in range(1, steps + 1):
        loss(*batch(seed))
        if moving:
            with torch.no_grad():
                generator = torch.Generator().manual_seed(seed)
                loss.weight += 0.1 * torch.randn(loss.weight.shape, generator=generator)


def value(loss: nn.Module, change: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    """In evaluation, so that nothing moves."""
    features, labels = batch()
    training = loss.training
    result = loss.eval()(change(features), labels).detach()
    loss.train(training)
    return result
